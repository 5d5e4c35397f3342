"""Ground truth to training targets, and predictions back to boxes.

B images, A anchors, G ground-truth boxes (padded to the fullest image of the batch).
"""

import math

import torch
from torch import Tensor

from detection.boxes import cxcywh_to_xyxy, pairwise_iou, xyxy_to_cxcywh
from ssd.anchors import Anchors

# The variances of the Caffe implementation: offsets are divided by 0.1, log sizes by 0.2.
CENTRE_WEIGHT = 10.0
SIZE_WEIGHT = 5.0
POSITIVE_IOU = 0.5
# A box is at most this many times as large as its anchor (Detectron's limit): an exponential that overflows in a
# network that has learned little would give infinite boxes. No box inside an image comes near it.
MAX_LOG_SIZE_RATIO = math.log(1000 / 16)


def match(boxes_xyxy: Tensor, labels: Tensor, anchors: Anchors) -> Tensor:
    """Give each anchor the index of its ground-truth box, or -1 (SSD paper, section 2.2).

    boxes_xyxy: (B, G, 4) normalised; labels: (B, G), 0 marks padding. Returns (B, A) int64.
    An anchor takes its best box if they overlap by more than 0.5. Each box keeps its best anchor even below
    that; if two boxes share it, the later one wins.
    """
    is_box = labels > 0
    iou = pairwise_iou(boxes_xyxy, anchors.boxes_xyxy).masked_fill_(~is_box.unsqueeze(-1), -1)  # (B, G, A)
    best_iou, best_box = iou.max(dim=1)
    matched = torch.where(best_iou > POSITIVE_IOU, best_box, -1)
    order = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    forced = torch.full_like(matched, -1).scatter_reduce_(
        1, iou.argmax(dim=2), torch.where(is_box, order, -1), reduce="amax"
    )
    return torch.where(forced >= 0, forced, matched)


def encode(boxes_xyxy: Tensor, labels: Tensor, anchors: Anchors) -> tuple[Tensor, Tensor]:
    """Match ground truth to anchors and encode it relative to them.

    boxes_xyxy: (B, G, 4) normalised, of positive width and height; labels: (B, G) in 1..K-1, 0 marks padding.
    Returns deltas (B, A, 4), 0 at negative anchors, and labels (B, A), 0 at negative anchors.
    """
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        # With as many boxes as each image has, and without what becomes zero. An accelerator would wait for each image.
        each = [encode_one(*of_one, anchors) for of_one in zip(boxes_xyxy, labels, strict=True)]
        return torch.stack([of_one[0] for of_one in each]), torch.stack([of_one[1] for of_one in each])
    matched = match(boxes_xyxy, labels, anchors)
    positive, index = matched >= 0, matched.clamp(min=0)
    anchor_labels = torch.where(positive, labels.gather(1, index), 0)
    boxes = boxes_xyxy.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
    # The logarithm must never see padding: a negative anchor is encoded against itself, which gives zeros.
    boxes_cxcywh = torch.where(positive.unsqueeze(-1), xyxy_to_cxcywh(boxes), anchors.boxes_cxcywh)
    return to_deltas(boxes_cxcywh, anchors), anchor_labels


def encode_one(boxes_xyxy: Tensor, labels: Tensor, anchors: Anchors) -> tuple[Tensor, Tensor]:
    """As `encode`, of one image: boxes (G, 4) and labels (G,) to deltas (A, 4) and labels (A,)."""
    (is_box,) = labels.nonzero(as_tuple=True)
    num_anchors = len(anchors.boxes_cxcywh)
    deltas, anchor_labels = boxes_xyxy.new_zeros(num_anchors, 4), labels.new_zeros(num_anchors)
    if len(is_box):
        boxes_xyxy, labels = boxes_xyxy[is_box], labels[is_box]
        matched = match(boxes_xyxy.unsqueeze(0), labels.unsqueeze(0), anchors)[0]
        (positive,) = (matched >= 0).nonzero(as_tuple=True)
        box = matched[positive]
        deltas[positive] = to_deltas(xyxy_to_cxcywh(boxes_xyxy[box]), anchors[positive])
        anchor_labels[positive] = labels[box]
    return deltas, anchor_labels


def to_deltas(boxes_cxcywh: Tensor, anchors: Anchors) -> Tensor:
    """Deltas (..., A, 4) of one box per anchor (..., A, 4): 10 Δcentre / size and 5 ln(size ratio)."""
    centre, size = anchors.boxes_cxcywh.split(2, dim=-1)
    return torch.cat(
        [
            CENTRE_WEIGHT * (boxes_cxcywh[..., :2] - centre) / size,
            SIZE_WEIGHT * (boxes_cxcywh[..., 2:] / size).log(),
        ],
        dim=-1,
    )


def decode(deltas: Tensor, anchors: Anchors) -> Tensor:
    """Boxes (..., A, 4) xyxy, normalised and not clipped to the image, of deltas (..., A, 4).

    The inverse of `to_deltas`, for boxes up to 62 times as wide and high as their anchor.
    """
    centre, size = anchors.boxes_cxcywh.split(2, dim=-1)
    return cxcywh_to_xyxy(
        torch.cat(
            [
                deltas[..., :2] / CENTRE_WEIGHT * size + centre,
                (deltas[..., 2:] / SIZE_WEIGHT).clamp(max=MAX_LOG_SIZE_RATIO).exp() * size,
            ],
            dim=-1,
        )
    )
