"""Postprocessing: predictions to detections by score threshold, box decoding and non-maximum suppression (NMS).

All images and classes of a batch are processed together. A group is the candidates of one class in one image, and NMS
runs on padded groups of similar size.

Shapes: B images, A anchors, K classes (0 is background), D detections over all images.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from detection.boxes import pairwise_iou
from detection.nn.detections import Detections
from ssd.anchors import Anchors
from ssd.box_coder import decode

# Limit for the number of pairs whose IoU is computed at once (1 GiB in float32).
MAX_PAIRS = 2**28
# Upper limits of the size classes of groups. Groups of one class are padded to the largest among them.
GROUP_SIZES = (4, 16, 64)
# Safety margin for rounding in the log-odds of a score.
BOUND_MARGIN = 1e-3


def detect(
    deltas: Tensor,
    logits: Tensor,
    anchors: Anchors,
    *,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    max_detections: int = 200,
) -> Detections:
    """Detect objects from deltas (B, A, 4) and logits (B, A, K), as in the MLPerf reference: normalized, not clipped.

    The `max_detections` best candidates of each class above the score threshold enter NMS. NMS drops a box whose IoU
    with a better kept box is at least `nms_threshold`. Each image keeps its best `max_detections`.
    """
    num_classes = logits.shape[-1]
    image, anchor = score_prefilter(logits, score_threshold).nonzero(as_tuple=True)
    scores = logits[image, anchor].float().softmax(dim=-1)[:, 1:]
    candidates = scores > score_threshold
    row, label = candidates.nonzero(as_tuple=True)
    image, anchor, score = image[row], anchor[row], scores[candidates]
    group = image * (num_classes - 1) + label

    order = sort_by_group(group, score)
    order = order[rank_in_group(group[order]) < max_detections]
    group, score, image, anchor, label = (t[order] for t in (group, score, image, anchor, label))
    boxes = decode(deltas[image, anchor].float(), anchors[anchor])

    keep = grouped_nms(boxes, group, nms_threshold)
    image, label, score, boxes = (t[keep] for t in (image, label, score, boxes))
    order = sort_by_group(image, score)
    order = order[rank_in_group(image[order]) < max_detections]
    return Detections(image[order], boxes[order], label[order] + 1, score[order])


def score_prefilter(logits: Tensor, score_threshold: float) -> Tensor:
    """Select the anchors of logits (B, A, K) that may have a class score above the threshold: (B, A) bool.

    A softmax over all anchors would take most of the time, and a trained network predicts background nearly
    everywhere. The test uses an upper bound: the score in a softmax over the best class and the background alone.
    """
    logit_gap = logits[..., 1:].amax(dim=-1).float() - logits[..., 0].float()
    min_logit_gap = math.log(score_threshold / (1 - score_threshold)) if score_threshold > 0 else -math.inf
    return logit_gap > min_logit_gap - BOUND_MARGIN


def sort_by_group(group: Tensor, score: Tensor) -> Tensor:
    """Return the stable order (N,) by group and, within a group, by descending score."""
    by_score = score.argsort(descending=True, stable=True)
    return by_score[group[by_score].argsort(stable=True)]


def rank_in_group(sorted_group: Tensor) -> Tensor:
    """Return the rank (N,) of each row within its group, from 0."""
    _, inverse, counts = sorted_group.unique_consecutive(return_inverse=True, return_counts=True)
    offsets = counts.cumsum(0) - counts
    return torch.arange(len(sorted_group), device=sorted_group.device) - offsets[inverse]


def grouped_nms(boxes_xyxy: Tensor, group: Tensor, nms_threshold: float) -> Tensor:
    """Apply NMS to each group of boxes: (N,) bool, True for kept boxes.

    boxes_xyxy: (N, 4) sorted by group and, within a group, best first. group: (N,). Groups of similar size are
    processed together, because the cost is the square of the padded size.
    """
    _, row, counts = group.unique_consecutive(return_inverse=True, return_counts=True)
    size = counts[row]
    keep = torch.empty_like(group, dtype=torch.bool)
    for lower, upper in pairwise((0, *GROUP_SIZES, len(group))):
        (same_size,) = ((size > lower) & (size <= upper)).nonzero(as_tuple=True)
        if len(same_size):
            keep[same_size] = nms_same_size(boxes_xyxy[same_size], group[same_size], nms_threshold)
    return keep


def nms_same_size(boxes_xyxy: Tensor, group: Tensor, nms_threshold: float) -> Tensor:
    """Apply NMS to groups of similar size in parallel, padded to the largest group: (N,) bool."""
    _, row, counts = group.unique_consecutive(return_inverse=True, return_counts=True)
    column = rank_in_group(group)
    width = int(counts.max())
    padded = boxes_xyxy.new_zeros(len(counts), width, 4)
    padded[row, column] = boxes_xyxy
    better = torch.ones(width, width, dtype=torch.bool, device=boxes_xyxy.device).triu(1)
    keep = [nms_keep_mask(part, better, nms_threshold) for part in padded.split(max(1, MAX_PAIRS // width**2))]
    return torch.cat(keep)[row, column]


def nms_keep_mask(boxes_xyxy: Tensor, better: Tensor, nms_threshold: float) -> Tensor:
    """Return the mask (groups, W) of kept boxes (groups, W, 4), sorted best first. better: (W, W), i before j.

    A box is kept if no better kept box suppresses it. The loop repeats this rule until the mask is stable. The result
    equals sequential greedy NMS, because after round r at least the first r boxes of each group are final.
    """
    suppresses = (pairwise_iou(boxes_xyxy, boxes_xyxy) >= nms_threshold) & better
    keep = torch.ones(suppresses.shape[:2], dtype=torch.bool, device=suppresses.device)
    while True:
        # A boolean matrix product, in float: does any kept box suppress this one?
        is_suppressed = torch.matmul(keep.unsqueeze(1).float(), suppresses.float()).squeeze(1) > 0
        if torch.equal(keep, ~is_suppressed):
            return keep
        keep = ~is_suppressed
