"""Losses of RetinaNet: focal loss over all anchors and classes, and L1 over the boxes of positive anchors.

B images, A anchors of one level or of all, K classes without a background, G ground-truth boxes.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from detection.boxes import pairwise_iou
from detection.nn import box_coder

LOSS_NAMES = ("class", "box")
ALPHA = 0.25  # weight of the positive class (Lin et al., Focal Loss for Dense Object Detection, section 3)
POSITIVE_IOU, NEGATIVE_IOU = 0.5, 0.4
NEGATIVE, IGNORED = -1, -2
# Ground-truth boxes of an image whose IoU with all anchors is in memory at once on a CPU: 15 MB at 800 pixels.
BOXES_PER_CHUNK = 32
# Logits whose loss is computed at once on a CPU: they stay in its cache through all operations.
CHUNK_ELEMENTS = 2**16
# Numbers that an accelerator computes at once: 1 GiB in float32. Fewer operations are launched, for any batch size.
MAX_ELEMENTS = 2**28


def match(boxes_xyxy: Tensor, valid: Tensor, anchors: Tensor, boxes_per_chunk: int = BOXES_PER_CHUNK) -> Tensor:
    """Match the anchors (A, 4) of images to their ground truth (..., G, 4), whose padding has valid (..., G) False.

    Returns for each anchor the index of its box, NEGATIVE or IGNORED: (..., A) int64. The box of an anchor is the first
    one of highest IoU. An anchor of the highest IoU that a box has with any anchor is positive as well, with its own
    best box, which may be another one.
    """
    best_iou = torch.full((*valid.shape[:-1], len(anchors)), -1.0, device=anchors.device)
    best = torch.zeros_like(best_iou, dtype=torch.int64)
    is_best_of_box = torch.zeros_like(best, dtype=torch.bool)
    for start in range(0, boxes_xyxy.shape[-2], boxes_per_chunk):
        rows = slice(start, start + boxes_per_chunk)
        is_valid = valid[..., rows, None]
        iou = pairwise_iou(boxes_xyxy[..., rows, :], anchors).masked_fill_(~is_valid, -1)
        chunk_iou, index = iou.max(dim=-2)
        is_better = chunk_iou > best_iou
        best_iou, best = torch.where(is_better, chunk_iou, best_iou), torch.where(is_better, index + start, best)
        is_best_of_box |= ((iou == iou.amax(dim=-1, keepdim=True)) & is_valid).any(dim=-2)
    matched = torch.where(best_iou >= NEGATIVE_IOU, IGNORED, NEGATIVE)
    return torch.where((best_iou >= POSITIVE_IOU) | is_best_of_box, best, matched)


@torch.no_grad()
def match_images(boxes_xyxy: Tensor, valid: Tensor, anchors: Sequence[Tensor]) -> Tensor:
    """Return `match` (B, A) of a batch: image by image on a CPU, and all images at once on an accelerator.

    boxes_xyxy: (B, G, 4). valid: (B, G). anchors: (A_l, 4) of each level. Not compiled, because each number of
    chunks would be compiled again.
    """
    all_anchors = torch.cat(list(anchors))
    if boxes_xyxy.device.type == "cpu":
        pairs = zip(boxes_xyxy, valid, strict=True)
        return torch.stack([match(image_boxes, image_valid, all_anchors) for image_boxes, image_valid in pairs])
    boxes_per_chunk = max(1, MAX_ELEMENTS // (len(boxes_xyxy) * len(all_anchors)))
    return match(boxes_xyxy, valid, all_anchors, boxes_per_chunk)


def retinanet_loss(
    logits: Sequence[Tensor],
    pred_deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    boxes_xyxy: Tensor,
    labels: Tensor,
    valid: Tensor,
) -> Tensor:
    """Return the class and box loss of each image (B, 2) as `loss_of_matched`. valid: (B, G), False for padding."""
    return loss_of_matched(logits, pred_deltas, anchors, boxes_xyxy, labels, match_images(boxes_xyxy, valid, anchors))


def loss_of_matched(
    logits: Sequence[Tensor],
    pred_deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    boxes_xyxy: Tensor,
    labels: Tensor,
    matched: Tensor,
) -> Tensor:
    """Return the class and box loss of each image: (B, 2) float32, each divided by the image's positive anchors.

    logits: (B, A_l, K) and pred_deltas: (B, A_l, 4) of each level. anchors: (A_l, 4) of each level. boxes_xyxy:
    (B, G, 4), and labels: (B, G) from 0. matched: (B, A) of `match_images`. Nothing waits for the device.
    """
    all_anchors = torch.cat(list(anchors))
    with torch.no_grad():
        positive = matched >= 0
        anchor_labels = torch.where(positive, labels.gather(1, matched.clamp(min=0)), matched)
        num_positive = positive.sum(dim=1).clamp(min=1)

    sizes = [len(level) for level in anchors]
    class_loss = torch.stack(
        [
            focal_loss(level_logits, level_labels)
            for level_logits, level_labels in zip(logits, anchor_labels.split(sizes, dim=1), strict=True)
        ]
    ).sum(dim=0)

    matched_boxes = boxes_xyxy.gather(1, matched.clamp(min=0)[..., None].expand(-1, -1, 4))
    # Anchors without a box get their own, so that no logarithm of padding enters the gradient.
    matched_boxes = torch.where(positive[..., None], matched_boxes, all_anchors)
    target_deltas = box_coder.encode(matched_boxes, all_anchors, legacy=False)
    box_loss = ((torch.cat(list(pred_deltas), dim=1).float() - target_deltas).abs() * positive[..., None]).sum((1, 2))
    return torch.stack([class_loss, box_loss], dim=1) / num_positive[:, None]


def focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the sigmoid focal loss with gamma 2 of each image: (B,) float32.

    logits: (B, A, K). labels: (B, A) the class of the anchor, NEGATIVE, or IGNORED. With gradients, the only memory
    beyond the logits is their gradient, which the forward pass computes at once.
    """
    total: Tensor = FocalLoss.apply(logits, labels)
    return total


class FocalLoss(torch.autograd.Function):
    """Focal loss that computes its gradient in the forward pass, so that no intermediate result is kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the sum of each image and, if needed, the gradient of each logit."""
        gradient = torch.empty_like(logits) if logits.requires_grad else None
        totals = logits.new_zeros(len(logits), dtype=torch.float32)
        num_images, num_anchors = chunk_shape(logits)
        for first in range(0, len(logits), num_images):
            images = slice(first, first + num_images)
            for start in range(0, logits.shape[1], num_anchors):
                chunk = (images, slice(start, start + num_anchors))
                loss, chunk_gradient = focal_terms(logits[chunk], labels[chunk], with_gradient=gradient is not None)
                totals[images] += loss
                if gradient is not None and chunk_gradient is not None:
                    gradient[chunk] = chunk_gradient
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        """Scale the gradient of each image by that of its sum."""
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_outputs[0].to(gradient.dtype)[:, None, None]), None


def chunk_shape(logits: Tensor) -> tuple[int, int]:
    """Return the images and the anchors of logits (B, A, K) whose loss is computed at once."""
    num_images, num_anchors, num_classes = logits.shape
    if torch.compiler.is_compiling():  # to code that keeps no intermediate result
        return num_images, num_anchors
    if logits.device.type == "cpu":
        return 1, max(1, CHUNK_ELEMENTS // num_classes)
    return max(1, MAX_ELEMENTS // (num_anchors * num_classes)), num_anchors


def focal_terms(logits: Tensor, labels: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Return the sum (B,) of the focal loss of logits (B, A, K) with labels (B, A), and its gradient (B, A, K).

    Every logit counts as negative first: 0.75·p²·softplus(x). The one logit of each anchor's class is then replaced by
    the positive form 0.25·(1 - p)²·softplus(-x).
    """
    x = logits.float()
    trained = (labels != IGNORED).unsqueeze(-1)
    p = x.sigmoid()
    # softplus(x) = -log(1 - p): exact for every x, with a single transcendental function more.
    softplus = F.softplus(x)
    weight = p.square().mul_(1 - ALPHA).mul_(trained)
    class_index = labels.clamp(min=0).unsqueeze(-1)
    positive = (labels >= 0).unsqueeze(-1)
    own_x, own_p, own_softplus = (values.gather(-1, class_index) for values in (x, p, softplus))
    own_weight = weight.gather(-1, class_index)
    own_q = (-own_x).sigmoid()  # 1 - p, exact for large x
    positive_weight = ALPHA * own_q.square()
    positive_loss = positive_weight * F.softplus(-own_x)
    total = (weight * softplus).sum((1, 2)) + ((positive_loss - own_weight * own_softplus) * positive).sum((1, 2))
    if not with_gradient:
        return total, None
    gradient = softplus.mul_(2).mul_(1 - p).add_(p).mul_(weight)
    positive_gradient = -positive_weight * (2 * own_p * F.softplus(-own_x) + own_q)
    own_gradient = torch.where(positive, positive_gradient, gradient.gather(-1, class_index))
    return total, gradient.scatter_(-1, class_index, own_gradient)
