"""Predictions to detections: decode, score threshold, non-maximum suppression per class.

B images, A anchors, K classes with background 0, D detections over all images.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from detection.boxes import pairwise_iou
from ssd.anchors import Anchors
from ssd.box_coder import decode

# Groups of candidates whose overlaps are computed at once are limited to this many pairs (1 GiB in float32).
MAX_PAIRS = 2**28
# Groups up to so many boxes are suppressed together, and apart from larger ones.
GROUP_SIZES = (4, 16, 64)
# What rounding may add to the logarithm of a score's odds, and more.
BOUND_MARGIN = 1e-3


class Detections(NamedTuple):
    """Detections of a batch, ordered by image and then by falling score.

    images: (D,) index in the batch; boxes_xyxy: (D, 4) normalised, not clipped; labels: (D,) in 1..K-1;
    scores: (D,) in [0, 1].
    """

    images: Tensor
    boxes_xyxy: Tensor
    labels: Tensor
    scores: Tensor


def detect(
    deltas: Tensor,
    logits: Tensor,
    anchors: Anchors,
    *,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    max_detections: int = 200,
) -> Detections:
    """Detections of deltas (B, A, 4) and logits (B, A, K), as in the MLPerf reference.

    Of each class, the `max_detections` best candidates above the threshold go through suppression, which drops
    a box that overlaps a better one that stays by `nms_threshold` or more; of what stays, each image keeps its best
    `max_detections`.
    """
    num_classes = logits.shape[-1]
    image, anchor = above(logits, score_threshold).nonzero(as_tuple=True)
    scores = logits[image, anchor].float().softmax(dim=-1)[:, 1:]
    candidates = scores > score_threshold
    row, label = candidates.nonzero(as_tuple=True)
    image, anchor, score = image[row], anchor[row], scores[candidates]
    group = image * (num_classes - 1) + label

    order = sort_by_group(group, score)
    place = place_in_group(group[order])
    order = order[place < max_detections]
    group, score, image, anchor, label = (t[order] for t in (group, score, image, anchor, label))
    boxes = decode(deltas[image, anchor].float(), anchors[anchor])

    keep = suppress(boxes, group, nms_threshold)
    image, label, score, boxes = (t[keep] for t in (image, label, score, boxes))
    order = sort_by_group(image, score)
    order = order[place_in_group(image[order]) < max_detections]
    return Detections(image[order], boxes[order], label[order] + 1, score[order])


def above(logits: Tensor, score_threshold: float) -> Tensor:
    """Which anchors may have a score of a class above the threshold: (B, A) bool of logits (B, A, K).

    A trained network is sure of the background nearly everywhere, and the softmax of all anchors would take most of
    the time. A score is at most what it were if there were no class but its own and the background.
    """
    lead = logits[..., 1:].amax(dim=-1).float() - logits[..., 0].float()
    least = math.log(score_threshold / (1 - score_threshold)) if score_threshold > 0 else -math.inf
    return lead > least - BOUND_MARGIN


def sort_by_group(group: Tensor, score: Tensor) -> Tensor:
    """Order (N,) that sorts by group and, inside a group, by falling score; ties keep their order."""
    by_score = score.argsort(descending=True, stable=True)
    return by_score[group[by_score].argsort(stable=True)]


def place_in_group(sorted_group: Tensor) -> Tensor:
    """Place (N,) of each row inside its run of equal values, from 0."""
    _, inverse, counts = sorted_group.unique_consecutive(return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(sorted_group), device=sorted_group.device) - starts[inverse]


def suppress(boxes_xyxy: Tensor, group: Tensor, nms_threshold: float) -> Tensor:
    """Which of N boxes stay: (N,) bool. boxes_xyxy: (N, 4) sorted by group, best first; group: (N,).

    Groups of like size go together, since a group is padded to the largest beside it, and costs its square.
    """
    _, row, counts = group.unique_consecutive(return_inverse=True, return_counts=True)
    size = counts[row]
    keep = torch.empty_like(group, dtype=torch.bool)
    for least, most in pairwise((0, *GROUP_SIZES, len(group))):
        (alike,) = ((size > least) & (size <= most)).nonzero(as_tuple=True)
        if len(alike):
            keep[alike] = suppress_alike(boxes_xyxy[alike], group[alike], nms_threshold)
    return keep


def suppress_alike(boxes_xyxy: Tensor, group: Tensor, nms_threshold: float) -> Tensor:
    """As `suppress`, of groups that are padded to the largest and suppressed side by side.

    A box stays if no better box that stays overlaps it. Applied until nothing changes, this reaches what the
    sequential greedy rule gives, since after round r at least the first r boxes of every group are final.
    """
    _, row, counts = group.unique_consecutive(return_inverse=True, return_counts=True)
    column = place_in_group(group)
    width = int(counts.max())
    padded = boxes_xyxy.new_zeros(len(counts), width, 4)
    padded[row, column] = boxes_xyxy
    better = torch.ones(width, width, dtype=torch.bool, device=boxes_xyxy.device).triu(1)
    kept = [stay(part, better, nms_threshold) for part in padded.split(max(1, MAX_PAIRS // width**2))]
    return torch.cat(kept)[row, column]


def stay(boxes_xyxy: Tensor, better: Tensor, nms_threshold: float) -> Tensor:
    """Which boxes of (groups, W, 4), best first, stay: (groups, W) bool; better[i, j] says i comes before j."""
    beats = (pairwise_iou(boxes_xyxy, boxes_xyxy) >= nms_threshold) & better
    keep = torch.ones(beats.shape[:2], dtype=torch.bool, device=beats.device)
    while True:
        # A matrix product over booleans, as float: is any box that stays one that beats me?
        beaten = torch.matmul(keep.unsqueeze(1).float(), beats.float()).squeeze(1) > 0
        if torch.equal(keep, ~beaten):
            return keep
        keep = ~beaten
