"""Cache of decoded images in device memory, and batch assembly on the device.

B images.
"""

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detection.config.run_config import RunConfig
from detection.config.settings import InputError
from detection.data import host_cache, image_io
from detection.data.batch import RankBatch
from detection.data.coco import Split
from detection.data.device_resize import CHANNELS, BatchCrops, bilinear_taps, get_resampler, slice_crops, stack_taps
from detection.data.host_cache import GIB
from detection.data.image_pipeline import DeviceBatchInput, DeviceImagePipeline, HostImagePipeline, ImagePipeline
from detection.data.pillow_io import read_errors
from detection.data.prefetch import to_device
from detection.runtime.device import device_name, free_memory_bytes, should_compile, supports_jpeg_decode, synchronize
from detection.runtime.distributed import DistContext

# Fraction of the memory that is free after a step. The rest is for batches with more boxes, and for evaluation.
FREE_MEMORY_FRACTION = 0.75
# Larger caches need 64-bit pixel offsets, for which code is compiled again.
INT32_PIXEL_LIMIT = 2**31


class DeviceImageCache:
    """Training images of a rank in device memory, stored on first use.

    Each image has a fixed slot, in the order of the split, up to the limit. Images beyond the limit are uploaded every
    time. The rank marks stored images in `pipeline.is_cached`, and its workers no longer send those. Workers must be
    forked after the cache is created. All work runs on the device's current stream.
    """

    def __init__(
        self,
        sizes_hw: NDArray[np.int32],
        limit_bytes: int,
        image_path: Callable[[int], Path],
        device: torch.device,
        *,
        device_decodes: bool,
        compiled: bool,
    ):
        """sizes_hw: (N, 2) pixels, from the annotation file. image_path: returns the path of an image by its index."""
        ends = np.cumsum(CHANNELS * sizes_hw.astype(np.int64).prod(axis=1))
        count = int(np.searchsorted(ends, limit_bytes, side="right"))
        offsets = np.concatenate([[0], ends[:count]])
        self.image_path = image_path
        self.pixels = torch.empty(int(offsets[-1]), dtype=torch.uint8, device=device)
        synchronize(device)  # other streams may use it from now on
        is_cached = np.frombuffer(mmap.mmap(-1, count + 1), dtype=np.uint8)[:count]
        self.pipeline = DeviceImagePipeline(offsets, is_cached, sizes_hw, device_decodes=device_decodes)
        self.resample = get_resampler(compiled=compiled)

    def assemble_batch(self, inputs: DeviceBatchInput) -> Tensor:
        """Return the batch (B, 3, H, W) uint8 on the device, channels last.

        Raises InputError with the path of a corrupt file.
        """
        host_tensors = inputs.order, inputs.decoded, inputs.offsets, inputs.widths, inputs.crops
        order, decoded, offsets, widths, crops = to_device(host_tensors, self.pixels.device)
        files = self.decode_uploaded(inputs)
        uploaded = torch.cat([decoded, *(image.permute(1, 2, 0).reshape(-1) for image in files)])
        self.store(uploaded, inputs.uploaded)
        num_uploaded = len(inputs.uploaded)
        num_cached = len(inputs.order) - num_uploaded
        sources = ((self.pixels, slice(0, num_cached), num_cached), (uploaded, slice(num_cached, None), num_uploaded))
        images = [
            self.resample(pixels, offsets[rows], widths[rows], slice_crops(crops, rows))
            for pixels, rows, count in sources
            if count
        ]
        return torch.cat(images).permute(0, 2, 3, 1)[order].permute(0, 3, 1, 2)

    def decode_uploaded(self, inputs: DeviceBatchInput) -> list[Tensor]:
        """Decode the images that were uploaded as files: (3, H, W) uint8 each, on the device."""
        headers = [(index, length) for index, _, _, length in inputs.uploaded.tolist() if length]
        if not headers:
            return []
        files = inputs.encoded.split([length for _, length in headers])
        try:
            return image_io.decode_jpeg_on_device(files, self.pixels.device)
        except RuntimeError:  # the message does not name the file, and the CPU may decode it
            decoded = []
            for (index, _), file in zip(headers, files, strict=True):
                with read_errors(self.image_path(index)):
                    decoded.append(image_io.decode(file.numpy().tobytes()).to(self.pixels.device))
            return decoded

    def store(self, pixels: Tensor, uploaded: Tensor) -> None:
        """Store the images in `pixels` (P,) that have a slot. uploaded: see `DeviceBatchInput`."""
        start, pipeline = 0, self.pipeline
        for index, height, width, _ in uploaded.tolist():
            stop = start + CHANNELS * height * width
            if index < len(pipeline.is_cached):
                self.pixels[pipeline.offsets[index] : pipeline.offsets[index + 1]] = pixels[start:stop]
                pipeline.is_cached[index] = 1
            start = stop


def validate(config: RunConfig, device: torch.device) -> None:
    """Raise InputError if the device does not support the settings."""
    if config.image_cache == "device":
        if device.type == "cpu":
            raise InputError("--image-cache device: needs an accelerator. On a CPU pass --image-cache host.")
        if not config.image_cache_gib and free_memory_bytes(device) is None:
            raise InputError("--image-cache device: torch does not report the free memory. Pass --image-cache-gib.")
    if config.jpeg_decoder == "gpu":
        if not supports_jpeg_decode(device):
            raise InputError(
                f"--jpeg-decoder gpu: torchcodec has no decoder for {device_name(device)}. Pass --jpeg-decoder cpu."
            )
        try:
            import torchcodec.decoders  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:
            raise InputError(
                f"--jpeg-decoder gpu: torchcodec cannot be loaded ({error}). Pass --jpeg-decoder cpu."
            ) from error


def build(config: RunConfig, split: Split, ranks: DistContext) -> tuple[ImagePipeline, DeviceImageCache | None]:
    """Return the workers' image pipeline, and the device cache if the device preprocesses the images."""
    if not config.device_preprocessing:
        return HostImagePipeline(host_cache.build(config, split.sizes_hw, ranks)), None
    cache = DeviceImageCache(
        split.sizes_hw,
        cache_limit_bytes(config, ranks.device),
        split.image_path,
        ranks.device,
        device_decodes=config.jpeg_decoder == "gpu",
        compiled=should_compile(config.compile, ranks.device),
    )
    return cache.pipeline, cache


def cache_limit_bytes(config: RunConfig, device: torch.device) -> int:
    """Return the device memory that the cache may use."""
    if config.image_cache != "device":
        return 0
    return int(config.image_cache_gib * GIB) or int(FREE_MEMORY_FRACTION * (free_memory_bytes(device) or 0))


def materialize_images(batches: Iterator[RankBatch[Any]], cache: DeviceImageCache | None) -> Iterator[RankBatch[Any]]:
    """Replace the images of each batch by those that the cache assembles, if there is one."""
    if cache is None:
        yield from batches
        return
    for rank_batch in batches:
        batch = rank_batch.batch
        yield rank_batch._replace(batch=batch._replace(images=cache.assemble_batch(batch.images)))


def warm_up(config: RunConfig, ranks: DistContext, size_hw: tuple[int, int]) -> None:
    """Compile the resampling of images of about this size before the timer starts, if it runs on the device."""
    if not config.device_preprocessing:
        return
    count, (height, width) = config.batch_size, size_hw
    zeros, rows = torch.zeros(count, dtype=torch.int64), torch.arange(height)
    column_taps, row_taps = (stack_taps([bilinear_taps(side, side)] * count, side) for side in (width, height))
    inputs = to_device((zeros, zeros + width, BatchCrops(zeros, rows, column_taps, row_taps)), ranks.device)
    for size in (CHANNELS * height * width, INT32_PIXEL_LIMIT):
        if size < INT32_PIXEL_LIMIT or cache_limit_bytes(config, ranks.device) >= INT32_PIXEL_LIMIT:
            pixels = torch.zeros(size, dtype=torch.uint8, device=ranks.device)
            get_resampler(compiled=should_compile(config.compile, ranks.device))(pixels, *inputs)
