"""Decoder of JPEG and other image formats, and resizing of decoded images."""

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
from detection.data.pillow_io import to_rgb

JPEG_START_MARKER, JPEG_END_MARKER = b"\xff\xd8", b"\xff\xd9"


def decode_with_pillow(encoded: bytes) -> Tensor:
    """Decode with Pillow, which is always available: bytes to (3, H, W) uint8 RGB with strides of (H, W, 3).

    `pillow_io.to_rgb` treats transparency and high bit depths, as for the images of `predict`.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)


def select_decoder() -> Callable[[bytes], Tensor]:
    """Return torchcodec's decoder if it loads: 1.35 times as fast as Pillow on one core, with the same pixels.

    Pillow decodes all formats but JPEG: torchcodec knows few of them and drops transparency.
    """
    try:
        from torchcodec.decoders import decode_image  # type: ignore[attr-defined]
    except (ImportError, OSError, RuntimeError):  # missing; no FFmpeg libraries; built for another torch
        return decode_with_pillow

    def decode(encoded: bytes) -> Tensor:
        return decode_image(encoded) if encoded.startswith(JPEG_START_MARKER) else decode_with_pillow(encoded)

    return decode


decode = select_decoder()


def read(path: Path) -> Tensor:
    """Read and decode one image: (3, H, W) uint8 RGB.

    The EXIF orientation is not applied: COCO's boxes refer to the stored pixels. Raises InputError with the path of
    a missing, truncated or corrupt file.
    """
    with image_errors(path):
        return decode(path.read_bytes())


@contextmanager
def image_errors(path: Path) -> Iterator[None]:
    """Convert errors of reading or decoding a file to InputError with its path."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: this image cannot be decoded ({reason}). Replace the file.") from error


def complete_jpeg_hw(encoded: bytes) -> tuple[int, int] | None:
    """Return height and width of a complete RGB or grayscale JPEG file, else None."""
    with Image.open(io.BytesIO(encoded)) as header:
        if header.format != "JPEG" or header.mode not in ("RGB", "L") or not encoded.endswith(JPEG_END_MARKER):
            return None
        return header.height, header.width


def decode_jpeg_on_device(encoded: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Decode complete JPEG files (L,) on a device with a decoder: (3, H, W) uint8 RGB each, on the device."""
    from torchcodec.decoders import decode_jpeg  # type: ignore[attr-defined]

    return [*decode_jpeg(list(encoded), device=device)]


def resize(image: Tensor, size_hw: int | tuple[int, int]) -> Tensor:
    """Resize (3, H, W) uint8 to (3, h, w), bilinear with antialiasing as in Pillow. An integer sets both sides."""
    # Keep the decoder's memory format: torch treats a crop as planar, which is slower.
    batch = image.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    return F.interpolate(batch, size=size_hw, mode="bilinear", antialias=True, align_corners=False)[0]


def random_images(count: int, size_hw: tuple[int, int]) -> Tensor:
    """Generate random images (count, 3, H, W) uint8, channels last."""
    images = torch.randint(0, 256, (count, 3, *size_hw), dtype=torch.uint8)
    return images.contiguous(memory_format=torch.channels_last)


def pad_to_batch(images: Sequence[Tensor], multiple_px: int = 1) -> Tensor:
    """Pad images (3, h, w) with zeros at the right and bottom to one batch (B, 3, H, W) uint8, channels last.

    H and W are the largest height and width, rounded up to multiples of `multiple_px`.
    """
    height, width = padded_hw([image.shape[1:] for image in images], multiple_px)
    batch = torch.empty(len(images), 3, height, width, dtype=torch.uint8, memory_format=torch.channels_last).zero_()
    for padded, image in zip(batch, images, strict=True):
        padded[:, : image.shape[1], : image.shape[2]] = image
    return batch


def padded_hw(sizes_hw: Sequence[Sequence[int]], multiple_px: int) -> tuple[int, int]:
    """Return the largest height and width, rounded up to multiples of `multiple_px`."""
    height, width = (-(-max(side) // multiple_px) * multiple_px for side in zip(*sizes_hw, strict=True))
    return height, width
