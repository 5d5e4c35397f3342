"""Git state of the program: its commit, and whether files differ from it."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNKNOWN = "unknown"


@dataclass(frozen=True)
class GitState:
    """Commit of the program, and whether its files differ from that commit.

    commit: 40 hexadecimal digits, or "unknown". dirty: files are modified or untracked. None if unknown.
    """

    commit: str
    dirty: bool | None


def read(fallback: str = "", root: Path = ROOT) -> GitState:
    """Return the state of the git repository at `root`, or `fallback` if there is none, as in a container.

    fallback: a commit, with the suffix "-dirty" if files differed, as `git describe --dirty` writes it. May be empty.
    """
    toplevel, head = _run_git(root, "rev-parse", "--show-toplevel"), _run_git(root, "rev-parse", "--verify", "HEAD")
    changes = _run_git(root, "status", "--porcelain")
    # Ignore a repository that merely contains root.
    if toplevel and head and changes is not None and Path(toplevel).resolve() == root.resolve():
        return GitState(head, changes != "")
    if fallback:
        return GitState(fallback.removesuffix("-dirty"), fallback.endswith("-dirty"))
    return GitState(UNKNOWN, None)


def _run_git(root: Path, *args: str) -> str | None:
    """Return the output of git, or None if git is missing or fails."""
    # A mounted repository may belong to another user. Without safe.directory, git rejects it.
    command = ["git", "-C", str(root), "-c", f"safe.directory={root}", *args]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
