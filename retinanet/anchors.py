"""Anchors of RetinaNet: three sizes and three aspect ratios per cell of five pyramid levels.

A: anchors of all levels, finest level first, row by row, then by aspect ratio, then by size.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from detection.runtime.device import device_constant

SIZES_PX = (32, 64, 128, 256, 512)
OCTAVE_SCALES = tuple(2 ** (i / 3) for i in range(3))
RATIOS = (0.5, 1.0, 2.0)  # height / width
ANCHORS_PER_CELL = len(OCTAVE_SCALES) * len(RATIOS)


def grid_hw(height_px: int, width_px: int) -> list[tuple[int, int]]:
    """Return the grid size of each level: convolutions halve the image three to seven times, and round up."""
    return [(-(-height_px // 2**halvings), -(-width_px // 2**halvings)) for halvings in range(3, 8)]


def cell_anchors(size_px: int) -> Tensor:
    """Return the anchors (9, 4) xyxy float32 around the origin, rounded to whole pixels, half to even.

    The larger sizes are truncated to whole pixels first, as in the MLPerf reference. All corners are integers. Beyond
    256, bfloat16 does not represent them, so anchors stay float32.
    """
    sizes = torch.tensor([int(size_px * scale) for scale in OCTAVE_SCALES], dtype=torch.float32)
    height_factors = torch.tensor(RATIOS).sqrt()
    heights = (height_factors[:, None] * sizes).flatten()
    widths = ((1 / height_factors)[:, None] * sizes).flatten()
    return (torch.stack([-widths, -heights, widths, heights], dim=1) / 2).round()


@lru_cache(maxsize=16)
def make_anchors(
    height_px: int, width_px: int, device: torch.device, sizes_px: Sequence[int] = SIZES_PX
) -> tuple[Tensor, ...]:
    """Return the anchors of each level, (A_l, 4) xyxy float32 in pixels of images of this size.

    The stride is the image size divided by the grid size, rounded down: 61 and 114 pixels for the two coarsest levels
    of 800-pixel images. Anchors start at multiples of the stride, without half a stride, and are not clipped.
    """
    levels = []
    for size, (rows, columns) in zip(sizes_px, grid_hw(height_px, width_px), strict=True):
        y = torch.arange(rows, device=device) * (height_px // rows)
        x = torch.arange(columns, device=device) * (width_px // columns)
        y, x = torch.meshgrid(y, x, indexing="ij")
        origins = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
        cell = device_constant(cell_anchors(size).flatten().tolist(), device).view(-1, 4)
        levels.append((origins + cell).reshape(-1, 4))
    return tuple(levels)


def num_anchors(height_px: int, width_px: int) -> int:
    """Return the number of anchors of an image of this size."""
    return ANCHORS_PER_CELL * sum(math.prod(hw) for hw in grid_hw(height_px, width_px))
