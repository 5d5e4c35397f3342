"""Cutting out and resizing many images at once, on any device: byte for byte what images.resize makes of each.

Resizing is a weighted sum of neighbouring pixels, first along each row and then down each column. The weights are
integers, so every device comes to the same result: Pillow's way, which torch has on the CPU alone.

B images, R rows of the highest cut, H and W the sides of the result, K taps.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Weights have as many bits after the point as 16 bits with a sign leave to the largest of them, and no more than this.
MAX_SHIFT = 22
# Taps are filled up to 8, 16, 32, ...: COCO's images of at most 640 pixels made 300 need 7, and code is compiled once.
MIN_TAPS = 8
# Images that are made at once by code that is not compiled, which keeps what it gathers for each of them.
IMAGES_AT_ONCE = 16
CHANNELS = 3


class Taps(NamedTuple):
    """What each place of one side of a resized image is made of.

    first: (n,) pixel that its first weight is of. weights: (n, k), of that pixel and those after it, in units of
    2**-shift.
    """

    first: NDArray[np.int64]
    weights: NDArray[np.int64]
    shift: int


class Side(NamedTuple):
    """The taps of one side of B images; weights of 0 fill up short sides and few taps.

    first: (B, n) int32. weights: (B, n, K) int16. shift: (B,) int32.
    """

    first: Tensor
    weights: Tensor
    shift: Tensor


class Cuts(NamedTuple):
    """Parts of B images, and what they are resized to.

    tops: (B,) int64 first row of each part. rows: (R,) int64 from 0. across: columns, counted from the left of the
    image. down: rows, counted from the top of the part.
    """

    tops: Tensor
    rows: Tensor
    across: Side
    down: Side


def taps(length: int, size: int, start: int = 0) -> Taps:
    """The taps that make `length` pixels from `start` on into `size`: triangles as wide as two pixels of the result."""
    scale = length / size
    support = max(scale, 1.0)
    centre = scale * (np.arange(size) + 0.5)
    first = (centre - support + 0.5).astype(np.int64).clip(min=0)
    stop = (centre + support + 0.5).astype(np.int64).clip(max=length)
    pixel = first[:, None] + np.arange((stop - first).max())
    shares = (1 - np.abs((pixel - centre[:, None] + 0.5) * (1 / support))).clip(min=0)
    shares[pixel >= stop[:, None]] = 0
    shares /= shares.sum(axis=1, keepdims=True)
    largest = shares.max()
    shift = next(
        bits for bits in range(MAX_SHIFT + 1) if bits == MAX_SHIFT or int(0.5 + largest * 2 ** (bits + 1)) >= 2**15
    )
    return Taps(start + first, (0.5 + shares * 2**shift).astype(np.int64), shift)


def mirrored(side: Taps) -> Taps:
    """The taps that make the same in reverse order."""
    return Taps(side.first[::-1], side.weights[::-1], side.shift)


def side_of(all_taps: Sequence[Taps], size: int) -> Side:
    """The taps of B images as one, for a side of `size` pixels: 0 beyond those of an image."""
    most = max(of_image.weights.shape[1] for of_image in all_taps)
    filled_up = max(MIN_TAPS, 1 << (most - 1).bit_length())
    first = np.zeros((len(all_taps), size), dtype=np.int32)
    weights = np.zeros((len(all_taps), size, filled_up), dtype=np.int16)
    for image, of_image in enumerate(all_taps):
        length, count = of_image.weights.shape
        first[image, :length] = of_image.first
        weights[image, :length, :count] = of_image.weights
    shift = torch.tensor([of_image.shift for of_image in all_taps], dtype=torch.int32)
    return Side(torch.from_numpy(first), torch.from_numpy(weights), shift)


def resample(pixels: Tensor, starts: Tensor, widths: Tensor, cuts: Cuts) -> Tensor:
    """The cuts of B images as one tensor (B, 3, H, W) uint8, channels last.

    pixels: (P,) uint8, images of (height, width, 3) anywhere in it. starts: (B,) int64 where each begins. widths:
    (B,) int64 pixels of its rows.
    """
    row = starts[:, None] + CHANNELS * widths[:, None] * (cuts.tops[:, None] + cuts.rows)  # (B, R)
    channel = torch.arange(CHANNELS, device=pixels.device)

    def of_columns(tap: int) -> Tensor:
        place = row[:, :, None] + CHANNELS * (cuts.across.first + tap)[:, None, :]
        # A weight of 0 may be of what lies beyond the last image.
        return pixels[place.clamp(max=len(pixels) - CHANNELS)[..., None] + channel]

    narrowed = weigh(of_columns, cuts.across.weights[:, None], cuts.across.shift)  # (B, R, W, 3)
    image = torch.arange(len(starts), device=pixels.device)[:, None]

    def of_rows(tap: int) -> Tensor:
        return narrowed[image, (cuts.down.first + tap).clamp(max=narrowed.shape[1] - 1)]

    return weigh(of_rows, cuts.down.weights[:, :, None], cuts.down.shift).permute(0, 3, 1, 2)


def weigh(pixels_of: Callable[[int], Tensor], weights: Tensor, shift: Tensor) -> Tensor:
    """The weighted sum of the pixels (B, ..., 3) of each tap, rounded to uint8; weights: (B, ..., K)."""
    total = pixels_of(0) * weights[..., 0, None].int()
    for tap in range(1, weights.shape[-1]):
        total = total + pixels_of(tap) * weights[..., tap, None].int()
    shift = shift[:, None, None, None]
    rounded = ((total >> (shift - 1)) + 1) >> 1
    return rounded.clamp(0, 255).to(torch.uint8)


def resample_by_parts(pixels: Tensor, starts: Tensor, widths: Tensor, cuts: Cuts) -> Tensor:
    """As `resample`, a few images after the other."""
    parts = [slice(begin, begin + IMAGES_AT_ONCE) for begin in range(0, len(starts), IMAGES_AT_ONCE)]
    return torch.cat([resample(pixels, starts[part], widths[part], of_images(cuts, part)) for part in parts])


def of_images(cuts: Cuts, part: slice) -> Cuts:
    """The cuts of some of the images."""
    across, down = (Side(*(tensor[part] for tensor in side)) for side in (cuts.across, cuts.down))
    return Cuts(cuts.tops[part], cuts.rows, across, down)


@cache
def resampler(*, compiled: bool) -> Callable[[Tensor, Tensor, Tensor, Cuts], Tensor]:
    """How to resample where code is compiled, once for any number of images and rows, and where it is not."""
    if not compiled:
        return resample_by_parts
    of_several = torch.compile(resample, dynamic=True)

    def of_any(pixels: Tensor, starts: Tensor, widths: Tensor, cuts: Cuts) -> Tensor:
        way = of_several if len(starts) > 1 else resample  # for one image it would be compiled apart
        return way(pixels, starts, widths, cuts)

    return of_any
