"""Boxes relative to others: R-CNN's deltas, and the two ways of counting a box's width.

Until Detectron2 a box included its last pixel: its width was x1 - x0 + 1. The MLPerf reference counts so (legacy);
torchvision does not. All boxes are xyxy in pixels.
"""

import math

import torch
from torch import Tensor

from detection import boxes

MAX_LOG_SCALE = math.log(1000 / 16)
"""A decoded box is at most so much larger than what it is relative to (Detectron)."""

RPN_WEIGHTS = (1.0, 1.0)
HEAD_WEIGHTS = (10.0, 5.0)
"""What offsets and logarithms of sizes are multiplied by."""


def encode(boxes_xyxy: Tensor, base_xyxy: Tensor, weights: tuple[float, float], *, legacy: bool) -> Tensor:
    """Deltas (..., 4) that lead from the base boxes (..., 4) to the boxes (..., 4)."""
    size = widths_heights(base_xyxy, legacy=legacy)
    wanted = widths_heights(boxes_xyxy, legacy=legacy)
    offset = (boxes_xyxy[..., :2] + 0.5 * wanted) - (base_xyxy[..., :2] + 0.5 * size)
    return torch.cat([offset / size * weights[0], torch.log(wanted / size) * weights[1]], dim=-1)


def decode(deltas: Tensor, base_xyxy: Tensor, weights: tuple[float, float], *, legacy: bool) -> Tensor:
    """Boxes (..., 4) that the deltas (..., 4) lead to from the base boxes, which broadcast to them."""
    size = widths_heights(base_xyxy, legacy=legacy)
    offset, log_scale = deltas[..., :2] / weights[0], deltas[..., 2:] / weights[1]
    centre = offset * size + base_xyxy[..., :2] + 0.5 * size
    half = 0.5 * torch.exp(log_scale.clamp(max=MAX_LOG_SCALE)) * size
    return torch.cat([centre - half, centre + half - int(legacy)], dim=-1)


def widths_heights(boxes_xyxy: Tensor, *, legacy: bool) -> Tensor:
    """Width and height (..., 2) of boxes (..., 4)."""
    return boxes_xyxy[..., 2:] - boxes_xyxy[..., :2] + int(legacy)


def pairwise_iou(boxes_a_xyxy: Tensor, boxes_b_xyxy: Tensor, *, legacy: bool) -> Tensor:
    """Overlap (..., N, M) of every pair."""
    return boxes.pairwise_iou(with_end(boxes_a_xyxy, legacy=legacy), with_end(boxes_b_xyxy, legacy=legacy))


def with_end(boxes_xyxy: Tensor, *, legacy: bool) -> Tensor:
    """The same boxes written so that x1 - x0 is their width: what area, overlap and NMS are computed from."""
    return torch.cat([boxes_xyxy[..., :2], boxes_xyxy[..., 2:] + 1], dim=-1) if legacy else boxes_xyxy


def clip(boxes_xyxy: Tensor, sizes_hw: Tensor, *, legacy: bool) -> Tensor:
    """Boxes (..., 4) cut off at the borders of their image; sizes_hw (..., 2) in pixels broadcasts to them."""
    sizes_wh = sizes_hw.flip(-1).to(boxes_xyxy)
    limits = torch.cat([sizes_wh, sizes_wh], dim=-1) - int(legacy)
    return boxes_xyxy.clamp(min=0).minimum(limits)
