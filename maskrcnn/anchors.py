"""Anchors of the region proposal network: one size per pyramid level, three aspect ratios per cell.

H, W: pixels of the padded images. A: anchors of all levels, finest level first, row by row, aspect ratio last.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from detection.runtime.device import device_constant

STRIDES_PX = (4, 8, 16, 32, 64)
SIZES_PX = (32, 64, 128, 256, 512)
RATIOS = (0.5, 1.0, 2.0)  # height / width


def grid_hw(height_px: int, width_px: int) -> list[tuple[int, int]]:
    """Return the grid size of each level. Image sizes are multiples of 32; P6 takes every second cell of P5."""
    cells = [(height_px // stride, width_px // stride) for stride in STRIDES_PX[:4]]
    rows, columns = cells[-1]
    return [*cells, ((rows + 1) // 2, (columns + 1) // 2)]


def cell_anchors(size_px: int, stride_px: int, *, legacy: bool) -> list[tuple[float, float, float, float]]:
    """Return the anchors (x0, y0, x1, y1) of the cell at the origin, one for each of `RATIOS`.

    legacy: Detectron's anchors, where a box of width w spans x to x + w - 1. Detectron rounds the sides at the size
    of the stride and scales them up, torchvision rounds the corners.
    """
    boxes = []
    for ratio in RATIOS:
        if legacy:
            width = round(math.sqrt(stride_px**2 / ratio))
            height = round(width * ratio)
            scale, center = size_px / stride_px, (stride_px - 1) / 2
            half_w, half_h = (width * scale - 1) / 2, (height * scale - 1) / 2
            boxes.append((center - half_w, center - half_h, center + half_w, center + half_h))
        else:
            half_w, half_h = size_px / math.sqrt(ratio) / 2, size_px * math.sqrt(ratio) / 2
            boxes.append((float(round(-half_w)), float(round(-half_h)), float(round(half_w)), float(round(half_h))))
    return boxes


@lru_cache(maxsize=64)  # images have few shapes, and building anchors costs as much as the proposals of one image
def make_anchors(
    height_px: int, width_px: int, device: torch.device, *, legacy: bool, sizes_px: tuple[int, ...] = SIZES_PX
) -> Tensor:
    """Return all anchors (A, 4) xyxy in pixels, for padded images of this size."""
    grids = grid_hw(height_px, width_px)
    return torch.cat(
        [
            make_level_anchors(*grid, device, size_px=size, stride_px=stride, legacy=legacy)
            for size, stride, grid in zip(sizes_px, STRIDES_PX, grids, strict=True)
        ]
    )


def make_level_anchors(
    rows: int, columns: int, device: torch.device, *, size_px: int, stride_px: int, legacy: bool
) -> Tensor:
    """Return the anchors (rows · columns · 3, 4) of one level."""
    y, x = (torch.arange(count, device=device) * stride_px for count in (rows, columns))
    y, x = torch.meshgrid(y, x, indexing="ij")
    shifts = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
    cell = [side for anchor in cell_anchors(size_px, stride_px, legacy=legacy) for side in anchor]
    return (shifts + device_constant(cell, device).view(-1, 4)).reshape(-1, 4)
