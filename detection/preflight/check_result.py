"""What the checks of all ranks found, as one table."""

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What a check found: its name, whether that will do, what was seen, and what to do about it."""

    name: str
    verdict: Verdict
    what: str
    what_to_do: str = ""


def terminal_columns() -> int | None:
    """The width that a table has on the terminal; None where it goes elsewhere, to be searched line by line."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(gathered: Sequence[Sequence[Finding]], columns: int | None = None) -> str:
    """The findings of all ranks, a line each and what to do below; once where ranks come to the same verdict.

    columns: lines of more characters are broken, if it is given; names of files are left whole.
    """
    rows: dict[tuple[str, int, Verdict], list[tuple[int, Finding]]] = {}
    for rank, findings in enumerate(gathered):
        seen: dict[str, int] = {}
        for finding in findings:
            number = seen[finding.name] = seen.get(finding.name, -1) + 1
            rows.setdefault((finding.name, number, finding.verdict), []).append((rank, finding))
    askers = {name: sum(any(f.name == name for f in findings) for findings in gathered) for name, _, _ in rows}
    wide = max(len(name) for name, _, _ in rows)
    lines = []
    for (name, _, verdict), found in sorted(rows.items(), key=lambda row: order(row[0][0], gathered)):
        whose = "" if len(found) == askers[name] else f"rank {', '.join(str(rank) for rank, _ in found)}: "
        texts = [whose + found[0][1].what] + ([found[0][1].what_to_do] if found[0][1].what_to_do else [])
        body = [part for text in texts for part in broken_lines(text, columns and columns - wide - 8)]
        lines += [f"{verdict}  {name:<{wide}}  {body[0]}", *(f"      {'':<{wide}}  {part}" for part in body[1:])]
    counts = {verdict: sum(row[2] == verdict for row in rows) for verdict in ("pass", "warn", "fail")}
    end = "not ready" if counts["fail"] else "ready"
    return "\n".join([*lines, f"{end}: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}"])


def broken_lines(text: str, columns: int | None) -> list[str]:
    """A text in lines of so many characters, of 20 at least."""
    if columns is None:
        return [text]
    return textwrap.wrap(text, max(20, columns), break_long_words=False, break_on_hyphens=False)


def order(name: str, gathered: Iterable[Sequence[Finding]]) -> int:
    """The place of a check among those of the first rank that made it."""
    return min((f.index(name) for f in ([one.name for one in of] for of in gathered) if name in f), default=0)
