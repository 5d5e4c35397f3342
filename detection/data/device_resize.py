"""Batched crop and resize on any device, bit-identical to `image_io.resize` on each image.

Resizing is a weighted sum of neighboring pixels, first along each row and then down each column. The weights are
integers, so every device computes the same result. Pillow does the same, but torch has it on the CPU only.

B images, R rows of the tallest crop, H and W the size of the result, K taps.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Upper limit of fraction bits per weight. The largest weight must fit in a signed 16-bit integer.
MAX_SHIFT = 22
# The number of taps is padded to 8, 16, 32, ..., so that code is compiled once. COCO's images of at most 640 pixels
# need 7 when resized to 300.
MIN_TAPS = 8
# Images per call of uncompiled code, which keeps the gathered pixels of all of them in memory.
CHUNK_SIZE = 16
CHANNELS = 3


class Taps(NamedTuple):
    """Filter taps for one axis of a resize.

    first: (n,) input pixel of the first weight. weights: (n, k) of that pixel and the next ones, in units of 2**-shift.
    """

    first: NDArray[np.int64]
    weights: NDArray[np.int64]
    shift: int


class BatchTaps(NamedTuple):
    """Taps for one axis of B images. Short axes and short filters are padded with weights of 0.

    first: (B, n) int32. weights: (B, n, K) int16. shift: (B,) int32.
    """

    first: Tensor
    weights: Tensor
    shift: Tensor


class BatchCrops(NamedTuple):
    """Crops of B images and the filters that resize them.

    tops: (B,) int64 first row of each crop. rows: (R,) int64 from 0. column_taps: relative to the left of the image.
    row_taps: relative to the top of the crop.
    """

    tops: Tensor
    rows: Tensor
    column_taps: BatchTaps
    row_taps: BatchTaps


def bilinear_taps(length: int, size: int, start: int = 0) -> Taps:
    """Return the taps that resize `length` pixels from `start` to `size`, with triangles two output pixels wide."""
    scale = length / size
    support = max(scale, 1.0)
    center = scale * (np.arange(size) + 0.5)
    first = (center - support + 0.5).astype(np.int64).clip(min=0)
    stop = (center + support + 0.5).astype(np.int64).clip(max=length)
    pixel = first[:, None] + np.arange((stop - first).max())
    weights = (1 - np.abs((pixel - center[:, None] + 0.5) * (1 / support))).clip(min=0)
    weights[pixel >= stop[:, None]] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    largest = weights.max()
    shift = next(
        bits for bits in range(MAX_SHIFT + 1) if bits == MAX_SHIFT or int(0.5 + largest * 2 ** (bits + 1)) >= 2**15
    )
    return Taps(start + first, (0.5 + weights * 2**shift).astype(np.int64), shift)


def flip_taps(taps: Taps) -> Taps:
    """Return the taps that produce the same pixels in reverse order."""
    return Taps(taps.first[::-1], taps.weights[::-1], taps.shift)


def stack_taps(all_taps: Sequence[Taps], size: int) -> BatchTaps:
    """Stack the taps of B images, padded with 0 to an axis of `size` pixels."""
    max_taps = max(taps.weights.shape[1] for taps in all_taps)
    num_taps = max(MIN_TAPS, 1 << (max_taps - 1).bit_length())
    first = np.zeros((len(all_taps), size), dtype=np.int32)
    weights = np.zeros((len(all_taps), size, num_taps), dtype=np.int16)
    for image, taps in enumerate(all_taps):
        length, count = taps.weights.shape
        first[image, :length] = taps.first
        weights[image, :length, :count] = taps.weights
    shift = torch.tensor([taps.shift for taps in all_taps], dtype=torch.int32)
    return BatchTaps(torch.from_numpy(first), torch.from_numpy(weights), shift)


def resample(pixels: Tensor, offsets: Tensor, widths: Tensor, crops: BatchCrops) -> Tensor:
    """Crop and resize B images to one tensor (B, 3, H, W) uint8, channels last.

    pixels: (P,) uint8 that contains images of (height, width, 3). offsets: (B,) int64 start of each image in it.
    widths: (B,) int64 image width in pixels.
    """
    row = offsets[:, None] + CHANNELS * widths[:, None] * (crops.tops[:, None] + crops.rows)  # (B, R)
    channel = torch.arange(CHANNELS, device=pixels.device)

    def gather_columns(tap: int) -> Tensor:
        offset = row[:, :, None] + CHANNELS * (crops.column_taps.first + tap)[:, None, :]
        # The pixel of a weight of 0 may lie beyond the last image.
        return pixels[offset.clamp(max=len(pixels) - CHANNELS)[..., None] + channel]

    resized_rows = weighted_sum(
        gather_columns, crops.column_taps.weights[:, None], crops.column_taps.shift
    )  # (B, R, W, 3)
    image = torch.arange(len(offsets), device=pixels.device)[:, None]

    def gather_rows(tap: int) -> Tensor:
        return resized_rows[image, (crops.row_taps.first + tap).clamp(max=resized_rows.shape[1] - 1)]

    return weighted_sum(gather_rows, crops.row_taps.weights[:, :, None], crops.row_taps.shift).permute(0, 3, 1, 2)


def weighted_sum(gather: Callable[[int], Tensor], weights: Tensor, shift: Tensor) -> Tensor:
    """Return the weighted sum over taps of pixels (B, ..., 3), rounded to uint8.

    gather: returns the pixels of a tap. weights: (B, ..., K).
    """
    total = gather(0) * weights[..., 0, None].int()
    for tap in range(1, weights.shape[-1]):
        total = total + gather(tap) * weights[..., tap, None].int()
    shift = shift[:, None, None, None]
    rounded = ((total >> (shift - 1)) + 1) >> 1
    return rounded.clamp(0, 255).to(torch.uint8)


def resample_chunked(pixels: Tensor, offsets: Tensor, widths: Tensor, crops: BatchCrops) -> Tensor:
    """Call `resample` on a few images at a time."""
    chunks = [slice(start, start + CHUNK_SIZE) for start in range(0, len(offsets), CHUNK_SIZE)]
    return torch.cat([resample(pixels, offsets[chunk], widths[chunk], slice_crops(crops, chunk)) for chunk in chunks])


def slice_crops(crops: BatchCrops, images: slice) -> BatchCrops:
    """Return the crops of a slice of the images."""
    column_taps, row_taps = (
        BatchTaps(*(tensor[images] for tensor in taps)) for taps in (crops.column_taps, crops.row_taps)
    )
    return BatchCrops(crops.tops[images], crops.rows, column_taps, row_taps)


@cache
def get_resampler(*, compiled: bool) -> Callable[[Tensor, Tensor, Tensor, BatchCrops], Tensor]:
    """Return the resample function, compiled once for any number of images and rows, or uncompiled."""
    if not compiled:
        return resample_chunked
    resample_compiled = torch.compile(resample, dynamic=True)

    def resample_any(pixels: Tensor, offsets: Tensor, widths: Tensor, crops: BatchCrops) -> Tensor:
        resample_fn = resample_compiled if len(offsets) > 1 else resample  # a batch of 1 would compile again
        return resample_fn(pixels, offsets, widths, crops)

    return resample_any
