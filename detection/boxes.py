"""Axis-aligned boxes: format conversion and overlap.

`boxes_xyxy`: left, top, right, bottom. `boxes_cxcywh`: center x, center y, width, height.
All functions keep the unit (pixels or normalized) and accept any leading dimensions.
"""

import torch
from torch import Tensor


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """Convert (..., 4) corners to (..., 4) centers and sizes."""
    lower, upper = boxes_xyxy.split(2, dim=-1)
    return torch.cat([0.5 * (lower + upper), upper - lower], dim=-1)


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Convert (..., 4) centers and sizes to (..., 4) corners."""
    center, size = boxes_cxcywh.split(2, dim=-1)
    return torch.cat([center - 0.5 * size, center + 0.5 * size], dim=-1)


def area(boxes_xyxy: Tensor) -> Tensor:
    """Return the areas (...,) of boxes (..., 4)."""
    size = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    return size[..., 0] * size[..., 1]


def pairwise_iou(boxes_a_xyxy: Tensor, boxes_b_xyxy: Tensor) -> Tensor:
    """Return the intersection over union of every pair: (..., N, 4) and (..., M, 4) to (..., N, M).

    Two boxes without area have no union. Their overlap is defined as 0.
    """
    a, b = boxes_a_xyxy.unsqueeze(-2), boxes_b_xyxy.unsqueeze(-3)
    width = (torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])).clamp_(min=0)
    height = (torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])).clamp_(min=0)
    intersection = width.mul_(height)
    union = area(a) + area(b) - intersection
    return torch.where(union > 0, intersection / union, 0)
