"""Which state of the program a run is made of: the commit, and whether files differ from it."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Source:
    """commit: 40 hexadecimal digits, or "unknown". dirty: files differ from it, or are new; None where unknown."""

    commit: str
    dirty: bool | None


def read(named: str = "", root: Path = ROOT) -> Source:
    """The state of the git repository at root; where there is none, as in a container, that which is named.

    named: a commit, with "-dirty" behind it where files differed, as `git describe --dirty` writes it; may be empty.
    """
    top, head = _git(root, "rev-parse", "--show-toplevel"), _git(root, "rev-parse", "--verify", "HEAD")
    changes = _git(root, "status", "--porcelain")
    if top and head and changes is not None and Path(top).resolve() == root.resolve():  # not one that it lies in
        return Source(head, changes != "")
    if named:
        return Source(named.removesuffix("-dirty"), named.endswith("-dirty"))
    return Source(UNKNOWN, None)


def _git(root: Path, *words: str) -> str | None:
    """What git says, or None where it is absent or refuses."""
    # A mounted repository may be another user's, which git would refuse.
    command = ["git", "-C", str(root), "-c", f"safe.directory={root}", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
