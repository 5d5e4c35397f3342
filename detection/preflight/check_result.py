"""Results of checks, and the table of all ranks' results."""

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class CheckResult:
    """Result of one check: its name, status, observation, and a hint what to do."""

    name: str
    status: Status
    message: str
    hint: str = ""


def terminal_columns() -> int | None:
    """Return the width of the terminal, or None if stdout is not one. Lines then stay whole for searching."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def format_table(rank_results: Sequence[Sequence[CheckResult]], columns: int | None = None) -> str:
    """Format the results of all ranks, each with its hint. Ranks with the same status share one line.

    columns: maximum line width. Paths are never broken.
    """
    rows: dict[tuple[str, int, Status], list[tuple[int, CheckResult]]] = {}
    for rank, results in enumerate(rank_results):
        occurrences: dict[str, int] = {}
        for result in results:
            occurrence = occurrences[result.name] = occurrences.get(result.name, -1) + 1
            rows.setdefault((result.name, occurrence, result.status), []).append((rank, result))
    checked_by = {
        name: sum(any(result.name == name for result in results) for results in rank_results) for name, _, _ in rows
    }
    width = max(len(name) for name, _, _ in rows)
    lines = []
    for (name, _, status), group in sorted(rows.items(), key=lambda row: check_position(row[0][0], rank_results)):
        prefix = "" if len(group) == checked_by[name] else f"rank {', '.join(str(rank) for rank, _ in group)}: "
        texts = [prefix + group[0][1].message] + ([group[0][1].hint] if group[0][1].hint else [])
        text_lines = [line for text in texts for line in wrap(text, columns and columns - width - 8)]
        lines += [
            f"{status}  {name:<{width}}  {text_lines[0]}",
            *(f"      {'':<{width}}  {line}" for line in text_lines[1:]),
        ]
    counts = {status: sum(row[2] == status for row in rows) for status in ("pass", "warn", "fail")}
    conclusion = "not ready" if counts["fail"] else "ready"
    return "\n".join([*lines, f"{conclusion}: {', '.join(f'{count} {status}' for status, count in counts.items())}"])


def wrap(text: str, columns: int | None) -> list[str]:
    """Wrap a text to the given width, at least 20 characters."""
    if columns is None:
        return [text]
    return textwrap.wrap(text, max(20, columns), break_long_words=False, break_on_hyphens=False)


def check_position(name: str, rank_results: Iterable[Sequence[CheckResult]]) -> int:
    """Return the position of a check in the results of the ranks that ran it, the smallest if they differ."""
    names_by_rank = [[result.name for result in results] for results in rank_results]
    return min((names.index(name) for names in names_by_rank if name in names), default=0)
