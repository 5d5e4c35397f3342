"""RoIAlign over a feature pyramid (Mask R-CNN, section 3; FPN, section 4.2).

Each output cell is the mean of 2 × 2 samples, and each sample interpolates four features. So a cell is a weighted sum
of 16 rows of the table of all features. `embedding_bag` computes it on any device, in the network's own type and
layout, for all images and levels in one call. R ROIs, C channels, P cells per side.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.runtime.device import device_constant

SAMPLING_RATIO = 2  # samples per side of a cell
FINEST_LEVEL, CANONICAL_LEVEL, CANONICAL_PX = 2, 4, 224


class Rois(NamedTuple):
    """Regions of interest of all images: boxes_xyxy (R, 4) in pixels, batch_index (R,) of their images."""

    boxes_xyxy: Tensor
    batch_index: Tensor


def assign_levels(rois_xyxy: Tensor, num_levels: int, *, legacy: bool) -> Tensor:
    """Return the pyramid level (R,), from 0, of each ROI: 224 pixels per side map to P4, 112 to P3."""
    size = rois_xyxy[:, 2:] - rois_xyxy[:, :2] + int(legacy)
    level = torch.floor(CANONICAL_LEVEL + torch.log2(size.prod(dim=1).clamp(min=0).sqrt() / CANONICAL_PX + 1e-6))
    return (level.clamp(FINEST_LEVEL, FINEST_LEVEL + num_levels - 1) - FINEST_LEVEL).long()


def roi_align(features: list[Tensor], rois: Rois, size: int, *, strides_px: tuple[int, ...], legacy: bool) -> Tensor:
    """Pool the ROIs from the pyramid: (R, C, size, size).

    features: (B, C, h, w) of each level, finest first. Equals torchvision's RoIAlign with sampling ratio 2 and
    without half-pixel alignment.
    """
    batch, channels = features[0].shape[:2]
    device = features[0].device
    table = torch.cat([level.permute(0, 2, 3, 1).reshape(-1, channels) for level in features])
    sizes_hw = [level.shape[2:] for level in features]
    heights, widths = (device_constant(sides, device, torch.int64) for sides in zip(*sizes_hw, strict=True))
    level_offsets = torch.cumsum(batch * heights * widths, dim=0) - batch * heights * widths

    level = assign_levels(rois.boxes_xyxy, len(features), legacy=legacy)
    height, width = heights[level], widths[level]
    first = level_offsets[level] + rois.batch_index * height * width
    boxes = rois.boxes_xyxy / device_constant(strides_px, device)[level, None]
    x_index, x_weight = bilinear_taps(boxes[:, 0], boxes[:, 2], width, size)
    y_index, y_weight = bilinear_taps(boxes[:, 1], boxes[:, 3], height, size)
    # Rows (R, P, 1, 4, 1) and columns (R, 1, P, 1, 4): each cell has 4 × 4 taps.
    rows = first[:, None, None] + y_index * width[:, None, None]
    index = rows[:, :, None, :, None] + x_index[:, None, :, None, :]
    weight = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]
    taps_per_cell = (2 * SAMPLING_RATIO) ** 2
    pooled = F.embedding_bag(
        index.reshape(-1, taps_per_cell),
        table,
        per_sample_weights=weight.reshape(-1, taps_per_cell).to(table.dtype),
        mode="sum",
    )
    return pooled.view(-1, size, size, channels).permute(0, 3, 1, 2)


def bilinear_taps(start: Tensor, stop: Tensor, length: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the feature indices (R, P, 4) that each cell samples along one axis, and their weights.

    start, stop: (R,) extent of the ROIs in features. length: (R,) number of features. A sample more than one feature
    outside has weight 0. A sample at the border takes the border's feature.
    """
    cells = torch.arange(size * SAMPLING_RATIO, device=start.device)
    extent = (stop - start).clamp(min=1)  # as in RoIAlign without alignment
    position = start[:, None] + (cells + 0.5) * (extent / (size * SAMPLING_RATIO))[:, None]
    is_inside = (position >= -1) & (position <= length[:, None])
    last = length[:, None] - 1
    position = position.clamp(min=0)
    low = position.long().minimum(last)
    high = (low + 1).minimum(last)
    high_weight = torch.where(low == last, 0, position - low)
    weight = torch.stack([1 - high_weight, high_weight], dim=-1) * is_inside[..., None] / SAMPLING_RATIO
    index = torch.stack([low, high], dim=-1)
    return index.view(len(start), size, -1), weight.view(len(start), size, -1)
