"""RoIAlign over a feature pyramid (Mask R-CNN, section 3; FPN, section 4.2).

Each output cell is the mean of 2 × 2 samples, and each sample interpolates four features. There are two methods:

- gather: a cell is a weighted sum of 16 rows of the table of all features. `embedding_bag` computes it on any device,
  in the network's own type and layout, for all images and levels in one call. It is the fastest on a CPU.
- torchvision: its kernel, for devices that have one. It computes in float32.

Neither waits for the device. R ROIs, C channels, P cells per side.
"""

from functools import cache, reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import ops

from detection.runtime.device import device_constant, has_own_kernel
from maskrcnn.config import RoiAlignMethod

SAMPLING_RATIO = 2  # samples per side of a cell
FINEST_LEVEL, CANONICAL_LEVEL, CANONICAL_PX = 2, 4, 224
OUTSIDE_PX = -1e6  # outside of every feature map, where torchvision's kernel reads and adds nothing


class Rois(NamedTuple):
    """Regions of interest of all images: boxes_xyxy (R, 4) in pixels, batch_index (R,) of their images."""

    boxes_xyxy: Tensor
    batch_index: Tensor


def flatten_rois(boxes_xyxy: Tensor) -> Rois:
    """Return the ROIs of boxes (B, P, 4) of B images, R = B · P."""
    images = torch.arange(boxes_xyxy.shape[0], device=boxes_xyxy.device)
    return Rois(boxes_xyxy.flatten(0, 1), images.repeat_interleave(boxes_xyxy.shape[1]))


def assign_levels(rois_xyxy: Tensor, num_levels: int, *, legacy: bool) -> Tensor:
    """Return the pyramid level (R,), from 0, of each ROI: 224 pixels per side map to P4, 112 to P3."""
    size = rois_xyxy[:, 2:] - rois_xyxy[:, :2] + int(legacy)
    level = torch.floor(CANONICAL_LEVEL + torch.log2(size.prod(dim=1).clamp(min=0).sqrt() / CANONICAL_PX + 1e-6))
    return (level.clamp(FINEST_LEVEL, FINEST_LEVEL + num_levels - 1) - FINEST_LEVEL).long()


def roi_align(
    features: list[Tensor],
    rois: Rois,
    size: int,
    *,
    strides_px: tuple[int, ...],
    legacy: bool,
    method: RoiAlignMethod = "auto",
) -> Tensor:
    """Pool the ROIs from the pyramid: (R, C, size, size).

    features: (B, C, h, w) of each level, finest first. Equals torchvision's RoIAlign with sampling ratio 2 and
    without half-pixel alignment. method "auto": gather on a CPU or where torchvision has no kernel.
    """
    if method == "auto":
        method = "torchvision" if has_torchvision_kernel(features[0].device) else "gather"
    pool = pool_with_torchvision if method == "torchvision" else pool_by_gathering
    level = assign_levels(rois.boxes_xyxy, len(features), legacy=legacy)
    return pool(features, rois, level, size, strides_px)


@cache
def has_torchvision_kernel(device: torch.device) -> bool:
    """Return whether torchvision has kernels of RoIAlign for the device, which is not a CPU."""
    names = ("torchvision::roi_align", "torchvision::_roi_align_backward")
    return device.type != "cpu" and all(has_own_kernel(name, device) for name in names)


def pool_with_torchvision(
    features: list[Tensor], rois: Rois, level: Tensor, size: int, strides_px: tuple[int, ...]
) -> Tensor:
    """Pool the ROIs with torchvision's kernel, where level (R,) is the index into `features`.

    Selecting the ROIs of a level would need their number on the host. Instead, each level pools all ROIs, of which
    those of other levels are moved outside and add 0. That costs a write of the result per level.
    """
    images = rois.batch_index[:, None].to(rois.boxes_xyxy)

    def pool_level(index: int) -> Tensor:
        boxes = rois.boxes_xyxy.masked_fill((level != index)[:, None], OUTSIDE_PX)
        indexed = torch.cat([images, boxes], dim=1)
        return ops.roi_align(features[index].float(), indexed, (size, size), 1 / strides_px[index], SAMPLING_RATIO)

    return reduce(torch.add, map(pool_level, range(len(features)))).to(features[0].dtype)


def pool_by_gathering(
    features: list[Tensor], rois: Rois, level: Tensor, size: int, strides_px: tuple[int, ...]
) -> Tensor:
    """Pool the ROIs with `embedding_bag`, where level (R,) is the index into `features`."""
    batch, channels = features[0].shape[:2]
    device = features[0].device
    table = torch.cat([feature.permute(0, 2, 3, 1).reshape(-1, channels) for feature in features])
    sizes_hw = [feature.shape[2:] for feature in features]
    heights, widths = (device_constant(sides, device, torch.int64) for sides in zip(*sizes_hw, strict=True))
    level_offsets = torch.cumsum(batch * heights * widths, dim=0) - batch * heights * widths

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
    return index.view(-1, size, 2 * SAMPLING_RATIO), weight.view(-1, size, 2 * SAMPLING_RATIO)
