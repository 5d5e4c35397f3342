"""The region proposal network's anchors: one size on each level of the pyramid, three shapes at every cell.

Detectron's name for a set at one cell is base or cell anchors. H, W are those of the padded images, in pixels;
A the anchors of all levels together, finest level first, row by row, the shapes of a cell side by side.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from detection.runtime.device import constant

STRIDES_PX = (4, 8, 16, 32, 64)
SIZES_PX = (32, 64, 128, 256, 512)
RATIOS = (0.5, 1.0, 2.0)
"""Height to width."""


def grid_hw(height_px: int, width_px: int) -> list[tuple[int, int]]:
    """Cells of each level for images of a size that is a multiple of 32; the last level is every second of P5's."""
    cells = [(height_px // stride, width_px // stride) for stride in STRIDES_PX[:4]]
    rows, columns = cells[-1]
    return [*cells, ((rows + 1) // 2, (columns + 1) // 2)]


def shapes(size_px: int, stride_px: int, *, legacy: bool) -> list[tuple[float, float, float, float]]:
    """The anchors (x0, y0, x1, y1) of the cell at the origin, one for each of `RATIOS`.

    legacy: Detectron's, in which a box of width w reaches from x to x + w - 1, and which rounds sides at the size of
    the stride and scales them up; else torchvision's, which rounds the corners.
    """
    boxes = []
    for ratio in RATIOS:
        if legacy:
            width = round(math.sqrt(stride_px**2 / ratio))
            height = round(width * ratio)
            scale, centre = size_px / stride_px, (stride_px - 1) / 2
            half_w, half_h = (width * scale - 1) / 2, (height * scale - 1) / 2
            boxes.append((centre - half_w, centre - half_h, centre + half_w, centre + half_h))
        else:
            half_w, half_h = size_px / math.sqrt(ratio) / 2, size_px * math.sqrt(ratio) / 2
            boxes.append((float(round(-half_w)), float(round(-half_h)), float(round(half_w)), float(round(half_h))))
    return boxes


@lru_cache(maxsize=64)  # images come in a few shapes, and making them costs as much as the proposals of one
def make_anchors(
    height_px: int, width_px: int, device: torch.device, *, legacy: bool, sizes_px: tuple[int, ...] = SIZES_PX
) -> Tensor:
    """All anchors (A, 4) xyxy in pixels of padded images of this size."""
    levels = []
    for size, stride, (rows, columns) in zip(sizes_px, STRIDES_PX, grid_hw(height_px, width_px), strict=True):
        y, x = (torch.arange(count, device=device) * stride for count in (rows, columns))
        y, x = torch.meshgrid(y, x, indexing="ij")
        shifts = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
        of_cell = constant([side for shape in shapes(size, stride, legacy=legacy) for side in shape], device)
        levels.append((shifts + of_cell.view(-1, 4)).reshape(-1, 4))
    return torch.cat(levels)
