"""A user's pictures of any kind: found, read as they are shown, named where they cannot be.

Unlike COCO's training images, which are decoded in `detection.data.image_io`.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from detection.config.settings import InputError

# Transparent parts are seen on this, as on a page.
PAPER = (255, 255, 255, 255)


@dataclass(frozen=True)
class Picture:
    """A picture as it is shown: turned as its EXIF orientation says, the first frame of several.

    image: RGB. mode: as the file has it, in Pillow's words. frames: in the file.
    """

    path: Path
    image: Image.Image
    mode: str
    frames: int


def find(paths: Sequence[Path]) -> list[Path]:
    """The pictures that are meant: a folder stands for those in it, by their suffixes; each is named once.

    Raises InputError where a folder holds none. Whether a file is there shows when it is read.
    """
    Image.init()
    found: dict[Path, Path] = {}
    for path in paths:
        inside = [path]
        if path.is_dir():
            inside = sorted(
                p for p in path.iterdir() if p.is_file() and p.suffix.lower() in Image.registered_extensions()
            )
            if not inside:
                raise InputError(f"{path}: no picture is in this folder")
        for file in inside:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def read(path: Path) -> Picture:
    """Read a picture of any format and mode that Pillow knows.

    Sixteen bits and floating-point values are brought to eight, transparent parts laid on white. Raises InputError
    that names the file where it is absent, broken, or larger than Pillow's limit against decompression bombs.
    """
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    try:
        with warnings.catch_warnings():
            # Pillow warns at half of the limit at which it refuses, and of much else that does no harm here.
            warnings.simplefilter("ignore")
            with Image.open(path) as opened:
                mode, frames = opened.mode, getattr(opened, "n_frames", 1)
                opened.seek(0)
                opened.load()
                return Picture(path, to_rgb(turned(opened)), mode, frames)
    except Image.DecompressionBombError:
        raise InputError(f"{path}: more than {limit:,} pixels, as a decompression bomb has. Make it smaller.") from None
    except MemoryError:
        raise InputError(f"{path}: there is no memory for its pixels. Make it smaller.") from None
    except OSError as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "it is in no format that is known" if unknown else error.strerror or str(error)
        raise InputError(f"{path}: this picture cannot be read ({reason})") from error
    except Exception as error:  # whatever a decoder of a broken file stumbles over
        raise InputError(f"{path}: this picture cannot be read ({error or type(error).__name__})") from error


def turned(image: Image.Image) -> Image.Image:
    """The picture as its EXIF orientation says; as it is where that is broken."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # whatever a parser of broken EXIF stumbles over: the pixels are sound
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB."""
    if is_deep(image):
        return Image.fromarray(to_bytes(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, PAPER)
        return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Whether its grey values have more than eight bits."""
    return image.mode.startswith("I") or image.mode == "F"


def to_bytes(
    values: np.ndarray[tuple[int, ...], np.dtype[np.generic]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Grey values (H, W) of more than eight bits to uint8.

    Pillow itself cuts off at 255, which leaves a 16-bit picture white. Integers within 16 bits keep their scale;
    others, and floating-point values beyond 0 to 1, have none, and are stretched to their own range.
    """
    grey = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = grey.min(), grey.max()
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif values.dtype.kind != "f" and low >= 0 and high <= 65_535:
        low, high = 0.0, 65_535.0
    return np.round((grey - low) * (255 / max(high - low, np.finfo(np.float64).tiny))).astype(np.uint8)
