"""The bytes of JPEG and other formats to pixels."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from detection.config.settings import InputError
from detection.data.pillow_io import is_deep, to_bytes

END_OF_JPEG = b"\xff\xd9"


def decode_with_pillow(encoded: bytes) -> Tensor:
    """Decode with Pillow, which is always there: bytes to (3, H, W) uint8 RGB, strides of (H, W, 3)."""
    with Image.open(io.BytesIO(encoded)) as image:
        shallow = Image.fromarray(to_bytes(np.asarray(image))) if is_deep(image) else image
        return torch.from_numpy(np.array(shallow.convert("RGB"))).permute(2, 0, 1)


def best_decoder() -> Callable[[bytes], Tensor]:
    """torchcodec's decoder where it loads: 1.35 times as fast as Pillow on one core, to the same pixels.

    Pillow takes what that does not know, such as BMP and TIFF.
    """
    try:
        from torchcodec.decoders import decode_image  # type: ignore[attr-defined]
    except (ImportError, OSError, RuntimeError):  # not there; without FFmpeg's libraries; built for another torch
        return decode_with_pillow

    def decode(encoded: bytes) -> Tensor:
        try:
            return decode_image(encoded)
        except ValueError:
            return decode_with_pillow(encoded)

    return decode


decode = best_decoder()


def read(path: Path) -> Tensor:
    """Read and decode one image: (3, H, W) uint8 RGB.

    The EXIF orientation is not applied: COCO's boxes refer to the stored pixels. InputError names a file that
    is absent, truncated or corrupt.
    """
    with naming(path):
        return decode(path.read_bytes())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raise InputError that names the file in place of what reading or decoding it raises."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: this image cannot be decoded ({reason}). Replace the file.") from error


def whole_jpeg_hw(encoded: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG file of colours or greys; None for all others, and for one that breaks off."""
    with Image.open(io.BytesIO(encoded)) as header:
        if header.format != "JPEG" or header.mode not in ("RGB", "L") or not encoded.endswith(END_OF_JPEG):
            return None
        return header.height, header.width


def decode_there(encoded: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Decode whole JPEG files (L,) on a device that has a decoder: (3, H, W) uint8 RGB each, on the device."""
    from torchcodec.decoders import decode_jpeg  # type: ignore[attr-defined]

    return [*decode_jpeg(list(encoded), device=device)]


def resize(image: Tensor, size_hw: int | tuple[int, int]) -> Tensor:
    """Resize (3, H, W) uint8 to (3, h, w) bilinearly with antialiasing, as Pillow does; one number is both sides."""
    # In the decoder's order: what torch takes a part of an image for is planar, and slower.
    batch = image.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    return F.interpolate(batch, size=size_hw, mode="bilinear", antialias=True, align_corners=False)[0]


def lay_out(pixels: Sequence[Tensor], multiple_px: int = 1) -> Tensor:
    """Images (3, h, w) in the upper left corners of one tensor (B, 3, H, W) uint8, channels last, zeros elsewhere.

    H and W are those of the highest and the widest image, made multiples of `multiple_px`.
    """
    height, width = common_hw([image.shape[1:] for image in pixels], multiple_px)
    batch = torch.empty(len(pixels), 3, height, width, dtype=torch.uint8, memory_format=torch.channels_last).zero_()
    for place, image in zip(batch, pixels, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch


def common_hw(sizes_hw: Sequence[Sequence[int]], multiple_px: int) -> tuple[int, int]:
    """The least multiples of `multiple_px` that are as high as the highest and as wide as the widest image."""
    height, width = (-(-max(side) // multiple_px) * multiple_px for side in zip(*sizes_hw, strict=True))
    return height, width
