"""Anchors of SSD300: the 8732 reference boxes that predictions are relative to.

Every cell of the six feature maps has 4 or 6 anchors of different sizes and aspect ratios. Large maps hold the
anchors for small objects. The paper calls anchors "default boxes", the Caffe code "prior boxes" (Liu et al. 2016,
section 2.2).
"""

from dataclasses import dataclass
from functools import cache
from itertools import product
from math import sqrt

import torch
from torch import Tensor

from detection.boxes import cxcywh_to_xyxy

IMAGE_SIZE_PX = 300
FEATURE_MAP_SIZES = (38, 19, 10, 5, 3, 1)
STEPS_PX = (8, 16, 32, 64, 100, 300)
SCALES_PX = (21, 45, 99, 153, 207, 261, 315)
ASPECT_RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
ANCHORS_PER_CELL = tuple(2 + 2 * len(ratios) for ratios in ASPECT_RATIOS)
NUM_ANCHORS = sum(n * size * size for n, size in zip(ANCHORS_PER_CELL, FEATURE_MAP_SIZES, strict=True))


@dataclass(frozen=True)
class Anchors:
    """Anchors in two box formats, normalized to the image. Order: map, size, row, column.

    boxes_cxcywh: (8732, 4), clamped to [0, 1]. boxes_xyxy: (8732, 4), the same boxes as corners, which may lie
    outside the image.
    """

    boxes_cxcywh: Tensor
    boxes_xyxy: Tensor

    def __getitem__(self, index: Tensor) -> "Anchors":
        """Select anchors by index."""
        return Anchors(self.boxes_cxcywh[index], self.boxes_xyxy[index])


@cache
def make_anchors(device: torch.device | str = "cpu") -> Anchors:
    """Build the anchors on a device, once per device."""
    boxes: list[tuple[float, float, float, float]] = []
    for level, (map_size, step_px) in enumerate(zip(FEATURE_MAP_SIZES, STEPS_PX, strict=True)):
        scale = SCALES_PX[level] / IMAGE_SIZE_PX
        geometric_mean = sqrt(scale * SCALES_PX[level + 1] / IMAGE_SIZE_PX)
        sizes = [(scale, scale), (geometric_mean, geometric_mean)]
        for ratio in ASPECT_RATIOS[level]:
            long_side, short_side = scale * sqrt(ratio), scale / sqrt(ratio)
            sizes += [(long_side, short_side), (short_side, long_side)]
        cells_per_image = IMAGE_SIZE_PX / step_px
        for (width, height), row, column in product(sizes, range(map_size), range(map_size)):
            boxes.append(((column + 0.5) / cells_per_image, (row + 0.5) / cells_per_image, width, height))
    boxes_cxcywh = torch.tensor(boxes, dtype=torch.float64).to(torch.float32).clamp_(0, 1)
    return Anchors(boxes_cxcywh.to(device), cxcywh_to_xyxy(boxes_cxcywh).to(device))
