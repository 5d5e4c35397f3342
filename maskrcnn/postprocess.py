"""Box-head predictions to detections: decoding, score threshold, non-maximum suppression per class.

B images, P proposals of an image, D detections of an image, K classes with background 0, S side of a mask (28).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from detection.nn import box_coder
from detection.nn.nms import nms
from maskrcnn.config import Config
from maskrcnn.rpn import Proposals

MIN_DETECTION_PX = 1e-2


class Detections(NamedTuple):
    """Detections of a batch, per image and best first.

    boxes_xyxy: (B, D, 4) pixels of the resized image. scores: (B, D) in [0, 1]. labels: (B, D) in 1..K-1, 0 is padding.
    masks: (B, D, S, S) probability of each point of the box to be inside the object, for the label's class.
    """

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor


def select_detections(
    logits: Tensor, deltas: Tensor, proposals: Proposals, sizes_hw: Tensor, config: Config
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the best detections of each image from logits (B, P, K) and deltas (B, P, K, 4); sizes_hw: (B, 2).

    Returns boxes (B, D, 4), scores (B, D) and labels (B, D) as in `Detections`.
    """
    legacy = config.legacy_boxes
    scores = logits.softmax(dim=2)[..., 1:].transpose(1, 2)  # (B, K - 1, P)
    candidates = (scores > config.score_threshold) & proposals.valid[:, None]
    width = max(1, int(candidates.sum(dim=2).max()))  # waits for the device, but shrinks NMS a hundredfold

    # The candidates of each class, best first. Equal scores stay in the order of the proposals.
    scores, index = scores.masked_fill(~candidates, -1).sort(dim=2, descending=True, stable=True)
    scores, index = scores[..., :width], index[..., :width]
    image = torch.arange(len(logits), device=logits.device)[:, None, None]
    label = torch.arange(1, logits.shape[2], device=logits.device)[:, None]
    boxes = box_coder.decode(
        deltas[image, index, label], proposals.boxes_xyxy[image, index], box_coder.BOX_HEAD_WEIGHTS, legacy=legacy
    )
    boxes = box_coder.clip(boxes, sizes_hw[:, None, None], legacy=legacy)
    valid = scores >= 0
    if not legacy:  # a legacy box is never empty
        valid &= (box_coder.widths_heights(boxes, legacy=legacy) >= MIN_DETECTION_PX).all(dim=-1)
    exclusive_boxes = box_coder.to_exclusive(boxes, legacy=legacy)
    keep = nms(exclusive_boxes.flatten(0, 1), valid.flatten(0, 1), config.nms_threshold).view_as(valid)

    top, order = scores.masked_fill(~keep, -1).flatten(1).sort(dim=1, descending=True, stable=True)
    top, order = top[:, : config.max_detections], order[:, : config.max_detections]
    is_kept = top >= 0
    top_boxes = boxes.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, 4))
    return top_boxes * is_kept[..., None], top * is_kept, (order // width + 1) * is_kept
