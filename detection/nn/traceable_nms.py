"""NMS for exported networks: no shape depends on a value, and its loops are part of the graph.

Shapes: B images, N boxes of an image, W boxes that may suppress each other.
"""

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop

from detection.boxes import pairwise_iou
from detection.nn.nms import round_threshold


def stable_topk(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest values of the last dimension, and their indices. Ties keep their order."""
    values, indices = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :count], indices[..., :count]


def nms_keep_mask(boxes_xyxy: Tensor, candidate: Tensor, iou_threshold: float, *, drop_equal: bool = False) -> Tensor:
    """Apply NMS to the candidates (..., W) among boxes (..., W, 4), sorted best first: (..., W) bool.

    drop_equal: a box is dropped if its IoU with a better box equals the threshold, too. A box remains if no better
    remaining box suppresses it. The loop repeats this rule until the mask is stable.
    """
    width = candidate.shape[-1]
    better = torch.ones(width, width, dtype=torch.bool, device=boxes_xyxy.device).triu(1)
    limit = round_threshold(iou_threshold, boxes_xyxy.dtype, drop_equal=drop_equal)
    suppresses = ((pairwise_iou(boxes_xyxy, boxes_xyxy) > limit) & better).float()

    def cond(keep: Tensor, previous: Tensor, suppresses: Tensor, candidate: Tensor) -> Tensor:
        return (keep != previous).any()

    def body(
        keep: Tensor, previous: Tensor, suppresses: Tensor, candidate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        is_suppressed = torch.matmul(keep.unsqueeze(-2).float(), suppresses).squeeze(-2) > 0
        return candidate & ~is_suppressed, keep.clone(), suppresses.clone(), candidate.clone()

    keep: Tensor = while_loop(cond, body, (candidate, ~candidate, suppresses, candidate.clone()))[0]
    return keep


def select_best(
    boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, count: int
) -> tuple[Tensor, Tensor]:
    """Apply NMS within each label and return the `count` best boxes, best first: scores and indices (B, count).

    boxes_xyxy: (B, N, 4). scores: (B, N), 0 for no candidate. labels: (B, N). Equal scores keep their order. The index
    is 0 where the score is 0. Each round takes the best box that is left, and drops those of its label that overlap it.
    So the cost depends on `count`, not on the square of N.
    """
    limit = round_threshold(iou_threshold, boxes_xyxy.dtype, drop_equal=False)
    slots = torch.arange(count, device=scores.device)
    positions = torch.arange(scores.shape[1], device=scores.device)

    def cond(slot: Tensor, left: Tensor, index: Tensor, top: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        return (slot < count) & (left > 0).any()

    def body(
        slot: Tensor, left: Tensor, index: Tensor, top: Tensor, boxes: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        best = left.argmax(dim=1, keepdim=True)  # the first of equal scores
        score = left.gather(1, best)
        overlap = pairwise_iou(boxes.gather(1, best[..., None].expand(-1, -1, 4)), boxes)[:, 0]
        is_dropped = ((overlap > limit) & (labels == labels.gather(1, best))) | (positions == best)
        is_slot = (slots == slot) & (score > 0)
        return (
            slot + 1,
            torch.where(is_dropped, 0.0, left),
            torch.where(is_slot, best, index),
            torch.where(is_slot, score, top),
            boxes.clone(),  # an output must not be an input
            labels.clone(),
        )

    initial = (
        torch.zeros((), dtype=torch.int64, device=scores.device),
        scores.contiguous(),
        torch.zeros(scores.shape[0], count, dtype=torch.int64, device=scores.device),
        scores.new_zeros(scores.shape[0], count),
        boxes_xyxy.contiguous(),
        labels.contiguous(),
    )
    _, _, index, top, _, _ = while_loop(cond, body, initial)
    return top, index
