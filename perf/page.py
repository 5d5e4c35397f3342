"""Tables in Markdown pages, each between two comments that mark its place."""

import re
from collections.abc import Sequence
from pathlib import Path

from detection.config.settings import InputError


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a Markdown table, the first of them as its header."""
    header, *rest = rows
    rule = (":---", *("---:" for _ in header[1:]))
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rest))


def update_table(page: Path, name: str, text: str) -> None:
    """Replace the table `name` of a page."""
    before, after = split_at_marker(page, name)
    page.write_text(f"{before}{text}\n{after}")


def split_at_marker(page: Path, name: str) -> tuple[str, str]:
    """Return the text before and after the table `name` of a page. Raise InputError if a marker is missing."""
    try:
        text = page.read_text()
    except OSError as error:
        raise InputError(f"{page}: {error.strerror}.") from None
    match = re.fullmatch(rf"(.*<!-- {name} -->\n).*?(<!-- end -->.*)", text, re.DOTALL)
    if not match:
        raise InputError(f"{page}: no marker for table {name}. Add <!-- {name} --> and, further down, <!-- end -->.")
    return match[1], match[2]
