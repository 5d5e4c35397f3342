"""Box coder: R-CNN's deltas between boxes, and the two conventions for the width of a box.

legacy: a box includes its last pixel, so its width is x1 - x0 + 1. The MLPerf reference and everything before
Detectron2 use this convention, torchvision does not. All boxes are xyxy in pixels.
"""

import math

import torch
from torch import Tensor

from detection import boxes

MAX_LOG_SCALE = math.log(1000 / 16)
"""Limit on the logarithm of the size ratio between a decoded box and its base box (Detectron)."""

UNIT_WEIGHTS = (1.0, 1.0)
BOX_HEAD_WEIGHTS = (10.0, 5.0)
"""Factors of the center offsets and of the logarithms of the size ratios, in the box head of Mask R-CNN."""


def encode(
    boxes_xyxy: Tensor, base_xyxy: Tensor, weights: tuple[float, float] = UNIT_WEIGHTS, *, legacy: bool
) -> Tensor:
    """Return the deltas (..., 4) from the base boxes (..., 4) to the boxes (..., 4)."""
    size = widths_heights(base_xyxy, legacy=legacy)
    target_size = widths_heights(boxes_xyxy, legacy=legacy)
    offset = (boxes_xyxy[..., :2] + 0.5 * target_size) - (base_xyxy[..., :2] + 0.5 * size)
    return torch.cat([offset / size * weights[0], torch.log(target_size / size) * weights[1]], dim=-1)


def decode(deltas: Tensor, base_xyxy: Tensor, weights: tuple[float, float] = UNIT_WEIGHTS, *, legacy: bool) -> Tensor:
    """Apply deltas (..., 4) to the base boxes, which broadcast to them; return the boxes (..., 4)."""
    size = widths_heights(base_xyxy, legacy=legacy)
    offset, log_scale = deltas[..., :2] / weights[0], deltas[..., 2:] / weights[1]
    center = offset * size + base_xyxy[..., :2] + 0.5 * size
    half = 0.5 * torch.exp(log_scale.clamp(max=MAX_LOG_SCALE)) * size
    return torch.cat([center - half, center + half - int(legacy)], dim=-1)


def widths_heights(boxes_xyxy: Tensor, *, legacy: bool) -> Tensor:
    """Return width and height (..., 2) of boxes (..., 4)."""
    return boxes_xyxy[..., 2:] - boxes_xyxy[..., :2] + int(legacy)


def pairwise_iou(boxes_a_xyxy: Tensor, boxes_b_xyxy: Tensor, *, legacy: bool) -> Tensor:
    """Return the IoU (..., N, M) of every pair."""
    return boxes.pairwise_iou(to_exclusive(boxes_a_xyxy, legacy=legacy), to_exclusive(boxes_b_xyxy, legacy=legacy))


def to_exclusive(boxes_xyxy: Tensor, *, legacy: bool) -> Tensor:
    """Convert boxes so that their width is x1 - x0, as area, IoU and NMS expect."""
    return torch.cat([boxes_xyxy[..., :2], boxes_xyxy[..., 2:] + 1], dim=-1) if legacy else boxes_xyxy


def clip(boxes_xyxy: Tensor, sizes_hw: Tensor, *, legacy: bool) -> Tensor:
    """Clip boxes (..., 4) to their image; sizes_hw (..., 2) in pixels broadcasts to them."""
    sizes_wh = sizes_hw.flip(-1).to(boxes_xyxy)
    limits = torch.cat([sizes_wh, sizes_wh], dim=-1) - int(legacy)
    return boxes_xyxy.clamp(min=0).minimum(limits)
