"""Matcher and sampler: match anchors or proposals to the ground truth by IoU, then sample those of a loss.

The sample of an image is a function of the seed that comes with the image, not of a generator's state. So neither the
number of ranks nor a resume changes it. B images, G ground-truth boxes, N anchors or proposals, S of them sampled.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.nn.box_coder import pairwise_iou

IGNORED = -1


def match(
    boxes_xyxy: Tensor,
    gt_boxes_xyxy: Tensor,
    gt_valid: Tensor,
    *,
    positive_iou: float,
    negative_iou: float,
    allow_low_quality_matches: bool,
    legacy: bool,
) -> tuple[Tensor, Tensor]:
    """Match the boxes (N, 4) of one image to its ground truth (G, 4); gt_valid (G,) is False for padding.

    Returns the index (N,) of the ground-truth box of highest IoU, and match labels (N,) int64: positive 1, negative 0,
    IGNORED between the two thresholds. allow_low_quality_matches: the box of highest IoU with a ground-truth box, and
    any box that ties with it, is positive even below the threshold (Faster R-CNN, section 3.1.2).
    """
    iou = pairwise_iou(gt_boxes_xyxy, boxes_xyxy, legacy=legacy).masked_fill(~gt_valid[:, None], -1)
    max_iou, index = iou.max(dim=0)
    match_labels = (max_iou >= positive_iou).long()
    match_labels = match_labels.masked_fill((max_iou >= negative_iou) & (max_iou < positive_iou), IGNORED)
    if allow_low_quality_matches:
        best_per_gt = iou.amax(dim=1, keepdim=True)
        match_labels = match_labels.masked_fill(((iou == best_per_gt) & (best_per_gt > 0)).any(dim=0), 1)
    return index, match_labels


def sample_pos_neg(
    match_labels: Tensor, priority: Tensor, count: int, positive_fraction: float
) -> tuple[Tensor, Tensor]:
    """Sample `count` positives and negatives of each image, at most `positive_fraction` of them positive.

    match_labels: (B, N) as from `match`. priority: (B, N) random numbers in [0, 1): the lowest are sampled, as from
    `hash_uniform`. Returns indices (B, S), positives first, S = min(count, N), and a mask (B, S) of the sampled ones:
    if an image has too few, other indices fill the rest.
    """
    num_boxes = match_labels.shape[1]
    num_samples = min(count, num_boxes)
    max_positives = min(int(count * positive_fraction), num_boxes)
    value, positives = priority.masked_fill(match_labels != 1, 2).topk(max_positives, dim=1, largest=False)
    num_positives = (value < 2).sum(dim=1, keepdim=True)
    value, negatives = priority.masked_fill(match_labels != 0, 2).topk(num_samples, dim=1, largest=False)
    slot = torch.arange(num_samples, device=match_labels.device)
    is_positive = slot < num_positives
    negative_slot = (slot - num_positives).clamp(min=0)
    positives = F.pad(positives, (0, num_samples - max_positives))
    sampled = torch.where(is_positive, positives, negatives.gather(1, negative_slot))
    return sampled, is_positive | (value < 2).gather(1, negative_slot)


def hash_uniform(seeds: Tensor, count: int) -> Tensor:
    """Return uniform numbers (B, count) float32 in [0, 1), a function of (seed, position); seeds (B,) have 31 bits.

    Applies murmur3's finalizer to a counter, in 64-bit integers, which every device type supports.
    """
    golden, first, second = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
    mask = torch.full((), 0xFFFFFFFF, device=seeds.device)
    bits = seeds[:, None] * golden + torch.arange(count, device=seeds.device) * first
    for shift, factor in ((16, first), (13, second)):
        bits = bits & mask
        bits = (bits ^ (bits >> shift)) * factor
    bits = bits & mask
    return ((bits ^ (bits >> 16)) >> 8).float() * 2.0**-24
