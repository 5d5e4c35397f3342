"""Image decoding, cropping and resizing: in the data worker, or on the device from uploaded data.

Both pipelines produce the same bytes. B images.
"""

from collections.abc import Sequence
from itertools import starmap
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detection.data import image_io
from detection.data.device_resize import CHANNELS, BatchCrops, Taps, bilinear_taps, flip_taps, stack_taps
from detection.data.host_cache import HostImageCache
from detection.data.image_file import ImageFile
from detection.data.pillow_io import read_errors


class SourceImage(NamedTuple):
    """An image before cropping and resizing.

    image_index: in the split. size_hw: in pixels. decoded: (3, H, W) uint8 RGB. encoded: the file's bytes (L,).
    If both are None, the device has the pixels cached.
    """

    image_index: int
    size_hw: tuple[int, int]
    decoded: Tensor | None = None
    encoded: Tensor | None = None


class CropSpec(NamedTuple):
    """A crop of an image with its target size.

    box_px: left, top, right and bottom. size_hw: size after resizing. flip: mirror horizontally after resizing.
    """

    source: SourceImage
    box_px: tuple[int, int, int, int]
    size_hw: tuple[int, int]
    flip: bool = False

    def column_taps(self) -> Taps:
        """Return the taps of its columns, relative to the left of the source image."""
        left, _, right, _ = self.box_px
        taps = bilinear_taps(right - left, self.size_hw[1], start=left)
        return flip_taps(taps) if self.flip else taps

    def row_taps(self) -> Taps:
        """Return the taps of its rows, relative to the top of the crop."""
        _, top, _, bottom = self.box_px
        return bilinear_taps(bottom - top, self.size_hw[0])


class DeviceBatchInput(NamedTuple):
    """Input from which the device assembles a batch.

    Images are sorted: cached images first, then images uploaded as pixels, then images uploaded as files.

    order: (B,) sorted position of each image of the batch. decoded: (P,) uint8, concatenated pixels (height, width, 3).
    encoded: (Q,) uint8, concatenated files. uploaded: (F, 4) per uploaded image its index in the split, height, width
    and file length (0 if uploaded as pixels). offsets: (B,) start of an image in the cached pixels, or in the uploaded
    ones. widths: (B,) of the images. crops: of all B images.
    """

    order: Tensor
    decoded: Tensor
    encoded: Tensor
    uploaded: Tensor
    offsets: Tensor
    widths: Tensor
    crops: BatchCrops


class ImagePipeline(Protocol):
    """Processing of images in a data worker."""

    def read(self, index: int, file: ImageFile) -> SourceImage:
        """Read an image, and decode it unless the device does.

        Raises InputError with the path of an unreadable file.
        """

    def transform(self, crop: CropSpec) -> Any:
        """Crop and resize an image, unless the device does."""

    def collate(self, images: Sequence[Any], multiple_px: int = 1) -> Any:
        """Combine the transformed images to one batch, padded to multiples of `multiple_px`."""


class HostImagePipeline:
    """Pipeline whose workers decode, crop and resize."""

    def __init__(self, cache: HostImageCache | None = None):
        self.cache = cache

    def read(self, index: int, file: ImageFile) -> SourceImage:
        """Read and decode an image. Raises InputError with the path of an unreadable file."""
        decoded = self.cache.read(index, file) if self.cache else image_io.read(*file)
        return SourceImage(index, image_hw(decoded), decoded=decoded)

    def transform(self, crop: CropSpec) -> Tensor:
        """Crop and resize to (3, h, w) uint8."""
        left, top, right, bottom = crop.box_px
        assert crop.source.decoded is not None
        image = image_io.resize(crop.source.decoded[:, top:bottom, left:right], crop.size_hw)
        return image.flip(2) if crop.flip else image

    def collate(self, images: Sequence[Tensor], multiple_px: int = 1) -> Tensor:
        """Pad the images to one batch (B, 3, H, W) uint8."""
        return image_io.pad_to_batch(images, multiple_px)


class DeviceImagePipeline:
    """Pipeline whose workers send the images that the device has not cached, and the crops of all.

    offsets: (M + 1,) start of each of the first M images in the cache, and the end of the last. is_cached: (M,) written
    by the rank. sizes_hw: (N, 2) of all images, from the annotations. device_decodes: send JPEG files undecoded.
    """

    def __init__(
        self,
        offsets: NDArray[np.int64],
        is_cached: NDArray[np.uint8],
        sizes_hw: NDArray[np.int32],
        *,
        device_decodes: bool,
    ):
        self.offsets, self.is_cached, self.sizes_hw, self.device_decodes = offsets, is_cached, sizes_hw, device_decodes

    def read(self, index: int, file: ImageFile) -> SourceImage:
        """Read an image unless the device has cached it. Raises InputError with the path of an unreadable file."""
        if index < len(self.is_cached) and self.is_cached[index]:
            height, width = self.sizes_hw[index].tolist()
            return SourceImage(index, (height, width))
        if not self.device_decodes:
            decoded = image_io.read(*file)
            return SourceImage(index, image_hw(decoded), decoded=decoded)
        with read_errors(file.path):
            encoded = file.path.read_bytes()
            if uploaded := image_io.device_jpeg(encoded, file):
                jpeg, size_hw = uploaded
                return SourceImage(index, size_hw, encoded=torch.frombuffer(bytearray(jpeg), dtype=torch.uint8))
            decoded = image_io.decode_file(encoded, file)
        return SourceImage(index, image_hw(decoded), decoded=decoded)

    def transform(self, crop: CropSpec) -> CropSpec:
        """Return the crop unchanged: the device applies it."""
        return crop

    def collate(self, images: Sequence[CropSpec], multiple_px: int = 1) -> DeviceBatchInput:
        """Return the input from which the device assembles the batch, padded like `image_io.pad_to_batch`."""
        order = sorted(range(len(images)), key=lambda row: storage_of(images[row].source))
        crops = [images[row] for row in order]
        cached = [crop.source for crop in crops if storage_of(crop.source) == CACHED]
        uploaded = [crop.source for crop in crops if storage_of(crop.source) != CACHED]
        ends = np.cumsum([0, *(CHANNELS * height * width for _, (height, width), *_ in uploaded)])
        height, width = image_io.padded_hw([crop.size_hw for crop in crops], multiple_px)
        tops, bottoms = ([crop.box_px[side] for crop in crops] for side in (1, 3))
        return DeviceBatchInput(
            order=torch.tensor(order).argsort(),
            decoded=concat_bytes(
                [source.decoded.permute(1, 2, 0).reshape(-1) for source in uploaded if source.decoded is not None]
            ),
            encoded=concat_bytes([source.encoded for source in uploaded if source.encoded is not None]),
            uploaded=torch.tensor(list(starmap(upload_header, uploaded)), dtype=torch.int64).reshape(-1, 4),
            offsets=torch.tensor([*(int(self.offsets[source.image_index]) for source in cached), *ends[:-1].tolist()]),
            widths=torch.tensor([crop.source.size_hw[1] for crop in crops]),
            crops=BatchCrops(
                torch.tensor(tops),
                torch.arange(max(bottom - top for top, bottom in zip(tops, bottoms, strict=True))),
                stack_taps([crop.column_taps() for crop in crops], width),
                stack_taps([crop.row_taps() for crop in crops], height),
            ),
        )


CACHED, DECODED, ENCODED = range(3)


def storage_of(source: SourceImage) -> int:
    """Return how the device gets the pixels of an image: CACHED, DECODED or ENCODED."""
    if source.encoded is not None:
        return ENCODED
    return CACHED if source.decoded is None else DECODED


def upload_header(
    image_index: int, size_hw: tuple[int, int], _: Tensor | None, encoded: Tensor | None
) -> tuple[int, ...]:
    """Return one row of `DeviceBatchInput.uploaded`."""
    return image_index, *size_hw, 0 if encoded is None else len(encoded)


def concat_bytes(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate any number of uint8 tensors (n,), or none."""
    return torch.cat([torch.empty(0, dtype=torch.uint8), *parts])


def image_hw(pixels: Tensor) -> tuple[int, int]:
    """Return height and width of an image (3, H, W)."""
    return pixels.shape[1], pixels.shape[2]
