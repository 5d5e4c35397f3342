"""Reader of a user's images in any format that Pillow supports, as a viewer shows them.

`detection.data.image_io` decodes the training images.
"""

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from detection.config.settings import InputError
from detection.data.file_content import CONTENT_HEAD, describe_other_content
from detection.data.image_file import UNDO, ImageFile, Pixels, read_orientation, read_stored_hw, transpose

HEIC_SUFFIXES = {".heic", ".heif", ".hif"}

# RGBA background of transparent parts.
TRANSPARENCY_FILL = (255, 255, 255, 255)


@dataclass(frozen=True)
class UserImage:
    """First frame of an image file with its EXIF orientation applied.

    image: RGB. mode: Pillow's mode of the file. num_frames: in the file.
    """

    path: Path
    image: Image.Image
    mode: str
    num_frames: int


def expand_paths(
    paths: Sequence[Path], *, recursive: bool = False, exclude: Collection[Path] = ()
) -> tuple[list[Path], list[Path]]:
    """Replace folders by the images in them (by suffix), and drop duplicates. Return the images and the skipped files.

    recursive: also search folders in a folder. exclude: resolved paths of files to ignore in folders. Raises InputError
    for a folder without images. `read` reports a missing file.
    """
    Image.init()
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN} | HEIC_SUFFIXES
    files: dict[Path, Path] = {}
    skipped: list[Path] = []
    for path in paths:
        candidates = [path]
        if path.is_dir():
            entries = path.rglob("*") if recursive else path.iterdir()
            found = sorted(file for file in entries if file.is_file() and file.resolve() not in exclude)
            # macOS stores metadata of a file beside it, in a file with its name after "._".
            candidates = [f for f in found if f.suffix.lower() in suffixes and not f.name.startswith("._")]
            skipped += sorted(set(found) - set(candidates))
            if not candidates:
                hint = "" if recursive else ", or --recursive"
                raise InputError(f"{path}: no image in this folder. Pass a folder with images, or files{hint}.")
        for file in candidates:
            files.setdefault(file.resolve(), file)
    return list(files.values()), skipped


def read(path: Path) -> UserImage:
    """Read an image of any format and mode that Pillow supports.

    16-bit and floating-point values become 8-bit. Transparent parts become white. Raises InputError with the path of
    a file that is missing, corrupt, or larger than Pillow's limit against decompression bombs.
    """
    with read_errors(path), warnings.catch_warnings():
        # Pillow warns at half of the limit at which it raises, and about much else that is harmless here.
        warnings.simplefilter("ignore")
        with Image.open(path) as opened:
            mode, frames = opened.mode, getattr(opened, "n_frames", 1)
            opened.seek(0)
            return UserImage(path, Image.fromarray(decode(opened, ImageFile(path, exif="apply"))), mode, frames)


def read_pixels(file: ImageFile) -> Pixels:
    """Read the pixels (H, W, 3) of an image to which its boxes refer. Raises InputError with its path."""
    with read_errors(file.path), Image.open(file.path) as opened:
        return decode(opened, file)


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Convert errors of reading or decoding an image to InputError with its path."""
    try:
        yield
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(
            f"{path}: more than {max_pixels():,} pixels, possibly a decompression bomb. Make it smaller."
        ) from None
    except MemoryError:
        raise InputError(f"{path}: not enough memory for its pixels. Make it smaller.") from None
    except Exception as error:  # a decoder may raise anything for a corrupt file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            with path.open("rb") as file:
                reason = describe_other_content(file.read(CONTENT_HEAD)) or "unknown image format"
            if path.suffix.lower() in HEIC_SUFFIXES:
                raise InputError(f"{path}: HEIC is not supported. Convert it to JPEG or PNG.") from None
        elif isinstance(error, OSError):
            reason = error.strerror or reason
        raise InputError(f"{path}: this image cannot be read ({reason}). Replace the file.") from error


def max_pixels() -> int:
    """Return the number of pixels above which an image is rejected: Pillow's limit for its own decoders."""
    return 2 * (Image.MAX_IMAGE_PIXELS or 0)


def decode_stored(image: Image.Image) -> Pixels:
    """Return the stored pixels (H, W, 3) of an opened image. Pillow itself rotates TIFF files."""
    orientation = read_orientation(image) if image.format == "TIFF" else 1
    return transpose(np.array(to_rgb(image)), UNDO.get(orientation, orientation))


def decode(image: Image.Image, file: ImageFile) -> Pixels:
    """Return the pixels (H, W, 3) of an opened image to which the boxes refer."""
    orientation = file.select_orientation(read_stored_hw(image), partial(read_orientation, image))
    return transpose(decode_stored(image), orientation)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB."""
    if is_high_bit_depth(image):
        return Image.fromarray(to_uint8(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, TRANSPARENCY_FILL)
        return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def is_high_bit_depth(image: Image.Image) -> bool:
    """Return True for grayscale of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def to_uint8(
    values: np.ndarray[tuple[int, ...], np.dtype[np.generic]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Convert grayscale values (H, W) of more than 8 bits to uint8.

    Pillow itself clips at 255, which turns a 16-bit image white. Integers within 16 bits and floating-point values
    within 0 to 1 keep their scale. Other values have no known scale and are stretched to the full range.
    """
    gray = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = gray.min(), gray.max()
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif values.dtype.kind != "f" and low >= 0 and high <= 65_535:
        low, high = 0.0, 65_535.0
    return np.round((gray - low) * (255 / max(high - low, np.finfo(np.float64).tiny))).astype(np.uint8)
