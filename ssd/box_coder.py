"""Box coder: ground truth to training targets, and predicted deltas back to boxes.

Matching assigns ground-truth boxes to anchors. Encoding expresses a box relative to its anchor as four deltas, and
decoding is the inverse.

Shapes: B images, A anchors, G ground-truth boxes (padded to the largest number in the batch).
"""

import math

import torch
from torch import Tensor

from detection.boxes import cxcywh_to_xyxy, pairwise_iou, xyxy_to_cxcywh
from ssd.anchors import Anchors

# The reciprocals of the variances in the Caffe implementation: 0.1 for offsets, 0.2 for log sizes.
XY_WEIGHT = 10.0
WH_WEIGHT = 5.0
POSITIVE_IOU = 0.5
# Detectron's limit for the size of a box relative to its anchor. It keeps the exponential of an untrained network
# from overflowing to infinite boxes. No box inside an image comes near it.
MAX_LOG_SIZE_RATIO = math.log(1000 / 16)


def match(gt_boxes_xyxy: Tensor, gt_labels: Tensor, anchors: Anchors) -> Tensor:
    """Return the index of each anchor's ground-truth box, or -1 without one: (B, A) int64 (SSD paper, section 2.2).

    gt_boxes_xyxy: (B, G, 4) normalized. gt_labels: (B, G), 0 marks padding. An anchor matches its best box if their
    IoU exceeds 0.5. Each box also matches its best anchor, at any IoU. If two boxes have the same best anchor, the
    later box wins.
    """
    is_valid = gt_labels > 0
    iou = pairwise_iou(gt_boxes_xyxy, anchors.boxes_xyxy).masked_fill_(~is_valid.unsqueeze(-1), -1)  # (B, G, A)
    best_iou, best_box = iou.max(dim=1)
    matched = torch.where(best_iou > POSITIVE_IOU, best_box, -1)
    order = torch.arange(gt_labels.shape[1], device=gt_labels.device).expand_as(gt_labels)
    forced = torch.full_like(matched, -1).scatter_reduce_(
        1, iou.argmax(dim=2), torch.where(is_valid, order, -1), reduce="amax"
    )
    return torch.where(forced >= 0, forced, matched)


def encode(gt_boxes_xyxy: Tensor, gt_labels: Tensor, anchors: Anchors) -> tuple[Tensor, Tensor]:
    """Match ground truth to anchors and encode it as training targets.

    gt_boxes_xyxy: (B, G, 4) normalized, of positive width and height. gt_labels: (B, G) in 1..K-1, 0 marks padding.
    Returns deltas (B, A, 4) and labels (B, A), both 0 at negative anchors.
    """
    if gt_labels.device.type == "cpu" and not torch.compiler.is_compiling():
        # Image by image: no work on padding and on negative anchors. An accelerator would synchronize once per image.
        targets = [encode_image(boxes, labels, anchors) for boxes, labels in zip(gt_boxes_xyxy, gt_labels, strict=True)]
        return torch.stack([deltas for deltas, _ in targets]), torch.stack([labels for _, labels in targets])
    matched = match(gt_boxes_xyxy, gt_labels, anchors)
    positive, index = matched >= 0, matched.clamp(min=0)
    anchor_labels = torch.where(positive, gt_labels.gather(1, index), 0)
    boxes = gt_boxes_xyxy.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
    # Padding must not reach the logarithm. A negative anchor is encoded against itself, which gives zeros.
    boxes_cxcywh = torch.where(positive.unsqueeze(-1), xyxy_to_cxcywh(boxes), anchors.boxes_cxcywh)
    return to_deltas(boxes_cxcywh, anchors), anchor_labels


def encode_image(gt_boxes_xyxy: Tensor, gt_labels: Tensor, anchors: Anchors) -> tuple[Tensor, Tensor]:
    """Match and encode one image: boxes (G, 4) and labels (G,) to deltas (A, 4) and labels (A,)."""
    (valid,) = gt_labels.nonzero(as_tuple=True)
    num_anchors = len(anchors.boxes_cxcywh)
    deltas, anchor_labels = gt_boxes_xyxy.new_zeros(num_anchors, 4), gt_labels.new_zeros(num_anchors)
    if len(valid):
        gt_boxes_xyxy, gt_labels = gt_boxes_xyxy[valid], gt_labels[valid]
        matched = match(gt_boxes_xyxy.unsqueeze(0), gt_labels.unsqueeze(0), anchors)[0]
        (positive,) = (matched >= 0).nonzero(as_tuple=True)
        index = matched[positive]
        deltas[positive] = to_deltas(xyxy_to_cxcywh(gt_boxes_xyxy[index]), anchors[positive])
        anchor_labels[positive] = gt_labels[index]
    return deltas, anchor_labels


def to_deltas(boxes_cxcywh: Tensor, anchors: Anchors) -> Tensor:
    """Encode one box per anchor (..., A, 4) as deltas (..., A, 4): 10 Δcenter / size and 5 ln(size ratio)."""
    center, size = anchors.boxes_cxcywh.split(2, dim=-1)
    return torch.cat(
        [
            XY_WEIGHT * (boxes_cxcywh[..., :2] - center) / size,
            WH_WEIGHT * (boxes_cxcywh[..., 2:] / size).log(),
        ],
        dim=-1,
    )


def decode(deltas: Tensor, anchors: Anchors) -> Tensor:
    """Decode deltas (..., A, 4) to boxes (..., A, 4) xyxy, normalized and not clipped to the image.

    This is the inverse of `to_deltas` for boxes up to 62 times as wide and high as their anchor.
    """
    center, size = anchors.boxes_cxcywh.split(2, dim=-1)
    return cxcywh_to_xyxy(
        torch.cat(
            [
                deltas[..., :2] / XY_WEIGHT * size + center,
                (deltas[..., 2:] / WH_WEIGHT).clamp(max=MAX_LOG_SIZE_RATIO).exp() * size,
            ],
            dim=-1,
        )
    )
