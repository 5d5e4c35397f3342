"""Decoder of JPEG and other image formats, and resizing of decoded images."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from detection.config.run_config import ExifRule
from detection.data.image_file import JPEG_START_MARKER, ImageFile, Pixels, read_orientation, strip_app1, transpose
from detection.data.pillow_io import decode_stored, max_pixels, read_errors

JPEG_END_MARKER = b"\xff\xd9"


def decode_with_pillow(encoded: bytes) -> Tensor:
    """Decode with Pillow, which is always available: bytes to (3, H, W) uint8 RGB with strides of (H, W, 3).

    The pixels are those that are stored. `pillow_io.to_rgb` treats transparency and high bit depths, as for the images
    of `predict`.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        return to_tensor(decode_stored(image))


def select_decoder() -> Callable[[bytes], Tensor]:
    """Return torchcodec's decoder if it loads: 1.35 times as fast as Pillow on one core, with the same pixels.

    Pillow decodes all formats but JPEG: torchcodec knows few of them, drops transparency, and returns all frames.
    """
    try:
        from torchcodec.decoders import decode_image  # type: ignore[attr-defined]
    except (ImportError, OSError, RuntimeError):  # missing; no FFmpeg libraries; built for another torch
        return decode_with_pillow

    def decode(encoded: bytes) -> Tensor:
        if not encoded.startswith(JPEG_START_MARKER):
            return decode_with_pillow(encoded)
        stored, (height, width) = strip_app1(encoded)
        if height * width > max_pixels():
            raise Image.DecompressionBombError
        return decode_image(stored)

    return decode


decode = select_decoder()


def read(path: Path, size_hw: tuple[int, int] | None = None, exif: ExifRule = "auto") -> Tensor:
    """Read and decode one image: (3, H, W) uint8 RGB, the pixels to which its boxes refer.

    The arguments are the fields of `ImageFile`. Raises InputError with the path of a missing, truncated or corrupt
    file, or of one that has another size than annotated.
    """
    with read_errors(path):
        return decode_file(path.read_bytes(), ImageFile(path, size_hw, exif))


def decode_file(encoded: bytes, file: ImageFile) -> Tensor:
    """Decode the bytes of an image file: (3, H, W) uint8 RGB, the pixels to which its boxes refer."""
    pixels = decode(encoded)
    orientation = select_orientation(encoded, file, (pixels.shape[1], pixels.shape[2]))
    return pixels if orientation == 1 else to_tensor(transpose(pixels.permute(1, 2, 0).numpy(), orientation))


def select_orientation(encoded: bytes, file: ImageFile, stored_hw: tuple[int, int]) -> int:
    """Return the EXIF orientation to apply to the stored pixels. Raises InputError for a size that is not annotated."""

    def read_from_header() -> int:
        with Image.open(io.BytesIO(encoded)) as header:
            return read_orientation(header)

    return file.select_orientation(stored_hw, read_from_header)


def to_tensor(pixels: Pixels) -> Tensor:
    """Return pixels (H, W, 3) as a tensor (3, H, W) with the same memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def device_jpeg(encoded: bytes, file: ImageFile) -> tuple[bytes, tuple[int, int]] | None:
    """Return the bytes and size that let a device decode a file to the pixels to which its boxes refer, else None.

    That is a complete RGB or grayscale JPEG file whose pixels are needed as stored.
    """
    if not encoded.startswith(JPEG_START_MARKER) or not encoded.endswith(JPEG_END_MARKER):
        return None
    with Image.open(io.BytesIO(encoded)) as header:
        if header.mode not in ("RGB", "L"):
            return None
    stored, stored_hw = strip_app1(encoded)
    return (stored, stored_hw) if select_orientation(encoded, file, stored_hw) == 1 else None


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
