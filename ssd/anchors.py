"""Anchors of SSD300: the 8732 boxes that predictions are relative to.

The paper calls them default boxes, the Caffe code prior boxes (Liu et al. 2016, section 2.2).
"""

from dataclasses import dataclass
from functools import cache
from itertools import product
from math import sqrt

import torch
from torch import Tensor

from detection.boxes import cxcywh_to_xyxy

IMAGE_SIZE_PX = 300
MAP_SIZES = (38, 19, 10, 5, 3, 1)
STEPS_PX = (8, 16, 32, 64, 100, 300)
SCALES_PX = (21, 45, 99, 153, 207, 261, 315)
ASPECT_RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
ANCHORS_PER_CELL = tuple(2 + 2 * len(ratios) for ratios in ASPECT_RATIOS)
NUM_ANCHORS = sum(n * size * size for n, size in zip(ANCHORS_PER_CELL, MAP_SIZES, strict=True))


@dataclass(frozen=True)
class Anchors:
    """The anchors in both formats, normalised to the image; order: map, size, row, column.

    boxes_cxcywh: (8732, 4), clamped to [0, 1]. boxes_xyxy: (8732, 4), the corners of those, which reach past
    the border where an anchor does.
    """

    boxes_cxcywh: Tensor
    boxes_xyxy: Tensor

    def __getitem__(self, index: Tensor) -> "Anchors":
        """Some of the anchors."""
        return Anchors(self.boxes_cxcywh[index], self.boxes_xyxy[index])


@cache
def make_anchors(device: torch.device | str = "cpu") -> Anchors:
    """Make the anchors on a device; each device gets them once."""
    boxes: list[tuple[float, float, float, float]] = []
    for level, (map_size, step_px) in enumerate(zip(MAP_SIZES, STEPS_PX, strict=True)):
        scale = SCALES_PX[level] / IMAGE_SIZE_PX
        between = sqrt(scale * SCALES_PX[level + 1] / IMAGE_SIZE_PX)
        sizes = [(scale, scale), (between, between)]
        for ratio in ASPECT_RATIOS[level]:
            wide, narrow = scale * sqrt(ratio), scale / sqrt(ratio)
            sizes += [(wide, narrow), (narrow, wide)]
        cells_per_image = IMAGE_SIZE_PX / step_px
        for (width, height), row, column in product(sizes, range(map_size), range(map_size)):
            boxes.append(((column + 0.5) / cells_per_image, (row + 0.5) / cells_per_image, width, height))
    boxes_cxcywh = torch.tensor(boxes, dtype=torch.float64).to(torch.float32).clamp_(0, 1)
    return Anchors(boxes_cxcywh.to(device), cxcywh_to_xyxy(boxes_cxcywh).to(device))
