"""Tables on a page of Markdown, each between two comments that mark its place."""

import re
from pathlib import Path

from detection.config.settings import InputError


def fill(page: Path, name: str, text: str) -> None:
    """Put a table in its place on a page."""
    before, after = place(page, name)
    page.write_text(f"{before}{text}\n{after}")


def place(page: Path, name: str) -> tuple[str, str]:
    """What is before and after a table on a page, which two comments mark; InputError where they are missing."""
    try:
        text = page.read_text()
    except OSError as error:
        raise InputError(f"--page {page}: {error.strerror}.") from None
    found = re.fullmatch(rf"(.*<!-- {name} -->\n).*?(<!-- end -->.*)", text, re.DOTALL)
    if not found:
        raise InputError(f"--page {page}: has no place for a table: <!-- {name} --> and, further down, <!-- end -->.")
    return found[1], found[2]
