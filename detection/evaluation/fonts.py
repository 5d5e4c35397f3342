"""Fonts for text in any script: from packages of Noto fonts, from matplotlib, and from the system.

The fonts are files in packages, which are not imported.
"""

import importlib.util
import unicodedata
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import ImageFont
from PIL.ImageFont import FreeTypeFont

if TYPE_CHECKING:
    from matplotlib.ft2font import FT2Font

FONT_PACKAGES = ("manimgx_fonts", "noto_cjk_sans_otc")
SUFFIXES = (".ttf", ".otf", ".ttc")


def split_by_font(text: str, size_px: int) -> list[tuple[str, FreeTypeFont]]:
    """Split a line of text into parts, each with a font that has its characters.

    A part ends at the first character that its font lacks. Control characters become spaces. A character that no font
    has is drawn as an empty frame.
    """
    line = "".join(" " if unicodedata.category(character) == "Cc" else character for character in text)
    if line.isascii():
        default = ImageFont.load_default(size_px)
        assert isinstance(default, FreeTypeFont)  # a bitmap font only if Pillow lacks FreeType
        return [(line, default)]
    parts: list[tuple[str, Path]] = []
    for character in line:
        if not parts or not has_glyph(parts[-1][1], character):
            parts.append(("", find_font(character) or (parts[-1][1] if parts else font_files()[0])))
        parts[-1] = (parts[-1][0] + character, parts[-1][1])
    for index in range(1, len(parts)):  # a space between two fonts would be at the far end of right-to-left text
        text, font = parts[index - 1]
        parts[index - 1] = (text.rstrip(), font)
        parts[index] = (" " * (len(text) - len(text.rstrip())) + parts[index][0], parts[index][1])
    return [(part, load(font, size_px)) for part, font in parts]


@cache
def find_font(character: str) -> Path | None:
    """Return the first font with a character, or None. Fonts of the system come last, since listing them is slow."""
    for list_files in (font_files, system_font_files):
        if font := next((path for path in list_files() if has_glyph(path, character)), None):
            return font
    return None


@cache
def has_glyph(path: Path, character: str) -> bool:
    """Return whether a font has a glyph for a character."""
    return open_face(path).get_char_index(ord(character)) != 0


@cache
def font_files() -> tuple[Path, ...]:
    """Return the regular fonts in packages: Noto Sans, its other scripts, then DejaVu Sans of matplotlib."""
    files = []
    for package in FONT_PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            files += sorted(path for path in Path(folder).iterdir() if is_regular(path))
    files.sort(key=lambda path: not path.stem.startswith("NotoSans["))
    return (*files, matplotlib_folder() / "DejaVuSans.ttf")


def is_regular(path: Path) -> bool:
    """Return whether a file is an upright font of text."""
    return path.suffix.lower() in SUFFIXES and not any(word in path.stem for word in ("Italic", "Oblique", "Bold"))


def matplotlib_folder() -> Path:
    """Return the folder of matplotlib's fonts."""
    from matplotlib import get_data_path

    return Path(get_data_path()) / "fonts" / "ttf"


@cache
def system_font_files() -> tuple[Path, ...]:
    """Return the regular fonts of the system."""
    from matplotlib.font_manager import findSystemFonts

    return tuple(sorted(path for path in map(Path, findSystemFonts()) if is_regular(path)))


@cache
def open_face(path: Path) -> "FT2Font":
    """Open a font to look up its characters."""
    from matplotlib.ft2font import FT2Font

    return FT2Font(str(path))


@cache
def load(path: Path, size_px: int) -> FreeTypeFont:
    """Load a font at a size to draw with it."""
    return ImageFont.truetype(path, size_px)
