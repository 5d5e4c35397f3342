"""Targets and losses of the ROI heads (Fast R-CNN, section 2.3; Mask R-CNN, section 3).

B images, G ground-truth boxes of the image with the most, N candidates of an image, R ROIs of all images, K classes
with background 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.nn import matcher
from maskrcnn.config import Config
from maskrcnn.roi_align import Rois, flatten_rois
from maskrcnn.rpn import Proposals

POSITIVE_IOU = 0.5


def match_rois(
    boxes_xyxy: Tensor, valid: Tensor, gt_boxes_xyxy: Tensor, gt_labels: Tensor, *, legacy: bool
) -> tuple[Tensor, Tensor]:
    """Match candidates (B, N, 4) to the ground truth (B, G, 4), whose labels (B, G) are 0 for padding.

    Returns the index (B, N) of the ground-truth box of highest IoU, and match labels (B, N) as from `matcher.match`:
    IGNORED where `valid` (B, N) is False.
    """
    matches = [
        matcher.match(
            image_boxes,
            gt_boxes,
            labels > 0,
            positive_iou=POSITIVE_IOU,
            negative_iou=POSITIVE_IOU,
            allow_low_quality_matches=False,
            legacy=legacy,
        )
        for image_boxes, gt_boxes, labels in zip(boxes_xyxy, gt_boxes_xyxy, gt_labels, strict=True)
    ]
    matched, match_labels = (torch.stack(part) for part in zip(*matches, strict=True))
    return matched, match_labels.masked_fill(~valid, matcher.IGNORED)


def sample_rois(
    proposals: Proposals, gt_boxes_xyxy: Tensor, gt_labels: Tensor, priority: Tensor, config: Config
) -> tuple[Rois, Tensor, Tensor]:
    """Sample ROIs to train on from the proposals (B, P) and the ground-truth boxes (B, G, 4), in this order.

    priority: (B, P + G) as for `matcher.sample_pos_neg`. Returns the ROIs, as many of each image, positives first; the
    index (R,) of the ground-truth box of highest IoU; and the label (R,), 0 for background, IGNORED for padding.
    """
    boxes = torch.cat([proposals.boxes_xyxy, gt_boxes_xyxy], dim=1)
    valid = torch.cat([proposals.valid, gt_labels > 0], dim=1)
    matched, match_labels = match_rois(boxes, valid, gt_boxes_xyxy, gt_labels, legacy=config.legacy_boxes)
    sampled, is_sampled = matcher.sample_pos_neg(
        match_labels, priority, config.box_batch_size_per_image, config.box_positive_fraction
    )
    matched = matched.gather(1, sampled)
    labels = gt_labels.gather(1, matched) * (match_labels.gather(1, sampled) == 1)
    labels = labels.masked_fill(~is_sampled, matcher.IGNORED)
    rois = flatten_rois(boxes.gather(1, sampled[..., None].expand(-1, -1, 4)))
    return rois, matched.flatten(), labels.flatten()


def box_losses(
    logits: Tensor, deltas: Tensor, labels: Tensor, positives: Tensor, target_deltas: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Return the class and box losses, (): means over all ROIs that are not padding.

    logits: (R, K). deltas: (R, K, 4). labels: (R,) as from `sample_rois`. positives: (P,) ROIs of an object.
    target_deltas: (P, 4). beta: of smooth L1.
    """
    count = (labels != matcher.IGNORED).sum().clamp(min=1)
    class_loss = F.cross_entropy(logits, labels, ignore_index=matcher.IGNORED, reduction="sum")
    predicted = deltas[positives, labels[positives]]
    box_loss = F.smooth_l1_loss(predicted, target_deltas, beta=beta, reduction="none").sum()
    return class_loss / count, box_loss / count


def mask_loss(logits: Tensor, mask_targets: Tensor) -> Tensor:
    """Return the mean binary cross-entropy, (), of masks (P, S, S) of the positives' own classes."""
    return F.binary_cross_entropy_with_logits(logits, mask_targets)
