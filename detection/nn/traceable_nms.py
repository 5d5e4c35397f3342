"""NMS for exported networks: no shape depends on a value, and its loops are part of the graph.

Shapes: W boxes that may suppress each other, D detections.
"""

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop

from detection.boxes import pairwise_iou


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
    iou = pairwise_iou(boxes_xyxy, boxes_xyxy)
    suppresses = ((iou >= iou_threshold if drop_equal else iou > iou_threshold) & better).float()

    def cond(keep: Tensor, previous: Tensor, suppresses: Tensor, candidate: Tensor) -> Tensor:
        return (keep != previous).any()

    def body(
        keep: Tensor, previous: Tensor, suppresses: Tensor, candidate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        is_suppressed = torch.matmul(keep.unsqueeze(-2).float(), suppresses).squeeze(-2) > 0
        return candidate & ~is_suppressed, keep.clone(), suppresses.clone(), candidate.clone()

    keep: Tensor = while_loop(cond, body, (candidate, ~candidate, suppresses, candidate.clone()))[0]
    return keep


def select_best(boxes_xyxy: Tensor, scores: Tensor, iou_threshold: float, count: int) -> tuple[Tensor, Tensor]:
    """Apply NMS to each class and return the `count` best of all classes, best first: scores and indices (B, count).

    boxes_xyxy: (B, C, W, 4). scores: (B, C, W), 0 for no candidate. index: into C · W, arbitrary where the score is 0.
    Each round takes the best box that is left, and drops those of its class that overlap it. So the cost depends on
    `count`, not on the square of the number of boxes.
    """
    batch, classes, width = scores.shape
    slots = torch.arange(count, device=scores.device)

    def cond(slot: Tensor, left: Tensor, index: Tensor, top: Tensor, boxes: Tensor) -> Tensor:
        return (slot < count) & (left > 0).any()

    def body(
        slot: Tensor, left: Tensor, index: Tensor, top: Tensor, boxes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        score = left.flatten(1).amax(dim=1)  # (B,)
        best = (left.flatten(1) == score[:, None]).to(torch.int64).argmax(dim=1)  # the first of equal scores
        of_class = (best // width)[:, None, None]
        own_boxes = boxes.gather(1, of_class[..., None].expand(-1, 1, width, 4))[:, 0]  # (B, W, 4)
        own_box = own_boxes.gather(1, (best % width)[:, None, None].expand(-1, 1, 4))
        is_dropped = pairwise_iou(own_box, own_boxes)[:, 0] > iou_threshold
        is_dropped = is_dropped | (torch.arange(width, device=best.device) == (best % width)[:, None])
        is_class = torch.arange(classes, device=best.device)[None, :, None] == of_class
        left = torch.where(is_class & is_dropped[:, None], 0.0, left)
        is_slot = slots == slot
        return (
            slot + 1,
            left,
            torch.where(is_slot, best[:, None], index),
            torch.where(is_slot, score[:, None], top),
            (boxes.clone()),
        )

    initial = (
        torch.zeros((), dtype=torch.int64, device=scores.device),
        scores.contiguous(),
        torch.zeros(batch, count, dtype=torch.int64, device=scores.device),
        scores.new_zeros(batch, count),
        boxes_xyxy.contiguous(),
    )
    _, _, index, top, _ = while_loop(cond, body, initial)
    return top, index
