"""Image file of a data set, and which of its pixels the boxes refer to: as stored, or as its EXIF orientation shows it.

One rule for every decoder. Imports no torch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from detection.config.run_config import ExifRule
from detection.config.settings import InputError

Pixels = NDArray[np.uint8]

ORIENTATION = ExifTags.Base.Orientation
# Orientation to its steps from the stored to the displayed pixels: whether to swap rows and columns, then the axes to
# reverse (0: rows, 1: columns).
STEPS: dict[int, tuple[bool, tuple[int, ...]]] = {
    1: (False, ()),
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}
UNDO = {6: 8, 8: 6}  # the other orientations undo themselves

JPEG_START_MARKER = b"\xff\xd8"
APP1, START_OF_SCAN = 0xE1, 0xDA
START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # C4, C8 and CC are tables
WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xDA)})


class SizeMismatch(InputError):
    """Image of another size than annotated."""


class ImageFile(NamedTuple):
    """Image file with its annotated size and the rule for its EXIF orientation.

    size_hw: pixels by the annotations, None if unknown.
    exif: "ignore" takes the pixels as stored, as COCO and the references do. "apply" takes them as displayed. "auto"
    takes them as displayed only if the annotated size is that of the displayed image and not that of the stored one.
    """

    path: Path
    size_hw: tuple[int, int] | None = None
    exif: ExifRule = "auto"

    def select_orientation(self, stored_hw: tuple[int, int], read_orientation: Callable[[], int]) -> int:
        """Return the orientation to apply to the stored pixels, 1 for none.

        read_orientation: returns the file's orientation, called only if it matters. Raises InputError if the image
        has another size than annotated.
        """
        expected_hw = stored_hw if self.size_hw is None else self.size_hw
        if self.exif == "ignore" or (self.exif == "auto" and expected_hw == stored_hw):
            orientation = 1
        else:
            orientation = read_orientation()
        actual_hw = displayed_hw(stored_hw, orientation)
        if self.size_hw is not None and actual_hw != self.size_hw:
            raise SizeMismatch(f"{self.path}: {self.describe_mismatch(actual_hw, self.size_hw)}")
        return orientation

    def describe_mismatch(self, actual_hw: tuple[int, int], annotated_hw: tuple[int, int]) -> str:
        """Describe an image of another size than annotated, with the likely cause."""
        (height, width), (annotated_height, annotated_width) = actual_hw, annotated_hw
        scale = annotated_width / width
        if annotated_hw == (width, height):
            hint = "Width and height are swapped: correct the annotations"
            if self.exif != "auto":
                hint += ", or pass --exif auto if the file has an EXIF orientation"
        elif abs(scale * height - annotated_height) <= 1:
            hint = f"The boxes are of a copy scaled by {scale:.4g}: scale width, height and boxes, or resize the images"
        else:
            hint = "Check that the annotations belong to this image"
        return f"{width}×{height} pixels, but {annotated_width}×{annotated_height} in the annotations. {hint}."


def displayed_hw(stored_hw: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return the size of the displayed image."""
    height, width = stored_hw
    return (width, height) if STEPS[orientation][0] else (height, width)


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened image, 1 to 8. It is 1 if there is none, or if it is corrupt."""
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # the parser may raise anything for corrupt EXIF data, but the pixels are intact
        return 1
    return orientation if orientation in STEPS else 1


def read_stored_hw(image: Image.Image) -> tuple[int, int]:
    """Return the stored size of an opened image. Pillow reports the displayed size of TIFF files."""
    if image.format == "TIFF":
        width, height = (image.getexif()[tag] for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength))
        return height, width
    return image.height, image.width


def transpose(pixels: Pixels, orientation: int) -> Pixels:
    """Return the displayed pixels (h, w, 3) of stored ones (H, W, 3), contiguous."""
    swap, axes = STEPS[orientation]
    return np.ascontiguousarray(np.flip(pixels.swapaxes(0, 1) if swap else pixels, axes))


def strip_app1(encoded: bytes) -> tuple[bytes, tuple[int, int]]:
    """Return a JPEG file without its APP1 segments, and its stored size (0, 0 if there is none).

    These segments hold the orientation (EXIF, XMP), which torchcodec would apply.
    """
    kept, size_hw, start, position = [], (0, 0), 0, len(JPEG_START_MARKER)
    while 0 <= (position := encoded.find(b"\xff", position)) < len(encoded) - 4:
        marker, length = encoded[position + 1], int.from_bytes(encoded[position + 2 : position + 4])
        if marker == START_OF_SCAN:
            break
        if marker in (0x00, 0xFF):  # fill bytes
            position += 1
        elif marker in WITHOUT_LENGTH:
            position += 2
        else:
            end = position + 2 + length
            if marker == APP1:
                kept.append(encoded[start:position])
                start = end
            elif marker in START_OF_FRAME:
                size_hw = (
                    int.from_bytes(encoded[position + 5 : position + 7]),
                    int.from_bytes(encoded[position + 7 : position + 9]),
                )
            position = end
    return (b"".join([*kept, encoded[start:]]) if kept else encoded), size_hw
