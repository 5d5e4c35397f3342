"""RoIAlign over a feature pyramid (Mask R-CNN, section 3; FPN, section 4.2).

Each cell of an aligned region is the mean of 2 × 2 samples, and each sample lies between four features: a weighted
sum of 16 rows of the table of all features, which `embedding_bag` computes on any device, in the network's own type
and layout, for all images and levels in one call. R regions, C channels, P cells on a side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.runtime.device import constant

SAMPLES = 2  # on a side of a cell
FINEST_LEVEL, CANONICAL_LEVEL, CANONICAL_PX = 2, 4, 224


def level_of(regions_xyxy: Tensor, num_levels: int, *, legacy: bool) -> Tensor:
    """The level (R,) from 0 that each region is taken from: one of 224 pixels on a side from P4, half of it from P3."""
    size = regions_xyxy[:, 2:] - regions_xyxy[:, :2] + int(legacy)
    level = torch.floor(CANONICAL_LEVEL + torch.log2(size.prod(dim=1).clamp(min=0).sqrt() / CANONICAL_PX + 1e-6))
    return (level.clamp(FINEST_LEVEL, FINEST_LEVEL + num_levels - 1) - FINEST_LEVEL).long()


def roi_align(
    features: list[Tensor],
    regions_xyxy: Tensor,
    images: Tensor,
    size: int,
    *,
    strides_px: tuple[int, ...],
    legacy: bool,
) -> Tensor:
    """Cut regions out of the pyramid: (R, C, size, size).

    features: (B, C, h, w) of each level, finest first. regions_xyxy: (R, 4) pixels of the images, whose numbers are
    images: (R,). The same as torchvision's with 2 samples and without its half-pixel alignment.
    """
    batch, channels = features[0].shape[:2]
    device = features[0].device
    table = torch.cat([level.permute(0, 2, 3, 1).reshape(-1, channels) for level in features])
    sizes_hw = [level.shape[2:] for level in features]
    heights, widths = (constant(sides, device, torch.int64) for sides in zip(*sizes_hw, strict=True))
    starts = torch.cumsum(batch * heights * widths, dim=0) - batch * heights * widths

    level = level_of(regions_xyxy, len(features), legacy=legacy)
    height, width = heights[level], widths[level]
    first = starts[level] + images * height * width
    regions = regions_xyxy / constant(strides_px, device)[level, None]
    x_index, x_weight = taps(regions[:, 0], regions[:, 2], width, size)
    y_index, y_weight = taps(regions[:, 1], regions[:, 3], height, size)
    # (R, P, 1, 4, 1) rows with (R, 1, P, 1, 4) columns: each cell has 4 × 4 taps.
    rows = first[:, None, None] + y_index * width[:, None, None]
    index = rows[:, :, None, :, None] + x_index[:, None, :, None, :]
    weight = y_weight[:, :, None, :, None] * x_weight[:, None, :, None, :]
    taps_each = (2 * SAMPLES) ** 2
    pooled = F.embedding_bag(
        index.reshape(-1, taps_each),
        table,
        per_sample_weights=weight.reshape(-1, taps_each).to(table.dtype),
        mode="sum",
    )
    return pooled.view(-1, size, size, channels).permute(0, 3, 1, 2)


def taps(start: Tensor, stop: Tensor, length: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Along one axis: the features (R, P, 4) that the samples of each cell lie between, and their weights.

    start, stop: (R,) of regions in features; length: (R,) features there are. A sample more than one feature outside
    weighs nothing, and one at the border is the border's feature.
    """
    cells = torch.arange(size * SAMPLES, device=start.device)
    extent = (stop - start).clamp(min=1)  # as RoIAlign without alignment has it
    position = start[:, None] + (cells + 0.5) * (extent / (size * SAMPLES))[:, None]
    inside = (position >= -1) & (position <= length[:, None])
    last = length[:, None] - 1
    position = position.clamp(min=0)
    low = position.long().minimum(last)
    high = (low + 1).minimum(last)
    share = torch.where(low == last, 0, position - low)
    weight = torch.stack([1 - share, share], dim=-1) * inside[..., None] / SAMPLES
    index = torch.stack([low, high], dim=-1)
    return index.view(len(start), size, -1), weight.view(len(start), size, -1)
