"""Postprocessing: predictions to detections by score threshold, box decoding and non-maximum suppression per class.

B images, A_l anchors of level l, K classes without a background, D detections of all images.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detection.nn import box_coder
from detection.nn.detections import Detections
from detection.nn.nms import grouped_nms, rank_in_group, sort_by_group
from detection.runtime.device import device_constant
from retinanet.model import HeadOutputs

# Parts of a level's logits for each score that it may keep.
PARTS_PER_CANDIDATE = 4
# Safety margin for rounding in the log-odds of a score.
BOUND_MARGIN = 1e-3


class Candidates(NamedTuple):
    """Class scores above the threshold: position of the image, anchor over all levels, class from 0, and score."""

    image: Tensor
    anchor: Tensor
    label: Tensor
    score: Tensor


def detect(
    outputs: HeadOutputs,
    anchors: Sequence[Tensor],
    size_hw: tuple[int, int],
    *,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    pre_nms_top_n: int = 1000,
    max_detections: int = 300,
) -> Detections:
    """Detect objects on images of one size, as in the MLPerf reference: in pixels, clipped to the image.

    anchors: (A_l, 4) of each level. The `pre_nms_top_n` best scores above the threshold of each level enter NMS, where
    an anchor may have several classes. NMS drops a box whose IoU with a better kept box of its class is above
    `nms_threshold`. Each image keeps its best `max_detections`.
    """
    levels, first_anchor = [], 0
    for logits in outputs.logits:
        levels.append(top_candidates(logits, score_threshold, pre_nms_top_n, first_anchor))
        first_anchor += logits.shape[1]
    image, anchor, label, score = (torch.cat(parts) for parts in zip(*levels, strict=True))

    group = image * outputs.logits[0].shape[2] + label
    order = sort_by_group(group, score)
    image, anchor, label, score, group = (values[order] for values in (image, anchor, label, score, group))
    deltas = torch.cat(outputs.deltas, dim=1)[image, anchor].float()
    boxes = box_coder.decode(deltas, torch.cat(list(anchors))[anchor], legacy=False)
    height, width = size_hw
    boxes = boxes.view(-1, 2, 2).clamp(min=0).minimum(device_constant([width, height], boxes.device)).view(-1, 4)

    keep = grouped_nms(boxes, group, nms_threshold)
    image, boxes, label, score = (values[keep] for values in (image, boxes, label, score))
    order = sort_by_group(image, score)
    order = order[rank_in_group(image[order]) < max_detections]
    return Detections(image[order], boxes[order], label[order] + 1, score[order])


def top_candidates(logits: Tensor, score_threshold: float, top_n: int, first_anchor: int) -> Candidates:
    """Return the best `top_n` scores of each image above the threshold in the logits (B, A_l, K) of one level.

    The largest logit of each part of an anchor's classes selects parts, so that most logits are read once and have no
    sigmoid: a trained network is confident at few anchors. Early in training, many logits are above the threshold. Then
    the `top_n`-th largest of these maxima is a lower bound of the best logits, since as many logits reach it. A small
    level has several parts per anchor, because the bound is closer with more maxima.
    """
    _, num_anchors, num_classes = logits.shape
    divisors = (n for n in range(1, num_classes) if num_classes % n == 0)
    num_parts = next((n for n in divisors if num_anchors * n >= PARTS_PER_CANDIDATE * top_n), num_classes)
    parts = logits.unflatten(2, (num_parts, -1)).flatten(1, 2)
    min_logit = math.log(score_threshold / (1 - score_threshold)) - BOUND_MARGIN if score_threshold > 0 else -math.inf
    max_logits = parts.amax(dim=2).float()
    bound = max_logits.new_full((len(logits), 1), min_logit)
    if max_logits.shape[1] > top_n:
        bound = bound.maximum(max_logits.topk(top_n, sorted=False).values.amin(dim=1, keepdim=True))
    image, part = (max_logits >= bound).nonzero(as_tuple=True)
    candidates = parts[image, part].float()
    row, column = (candidates >= bound[image]).nonzero(as_tuple=True)
    image, part, score = image[row], part[row], candidates[row, column].sigmoid()
    anchor, label = part // num_parts, part % num_parts * parts.shape[2] + column
    order = sort_by_group(image, score)
    order = order[(rank_in_group(image[order]) < top_n) & (score[order] > score_threshold)]
    return Candidates(image[order], first_anchor + anchor[order], label[order], score[order])
