"""Postprocessing: predictions to detections by score threshold, box decoding and non-maximum suppression (NMS).

All images and classes of a batch are processed together. A group is the candidates of one class in one image, and NMS
runs on padded groups of similar size.

Shapes: B images, A anchors, K classes (0 is background), D detections over all images.
"""

import math

from torch import Tensor

from detection.nn.detections import Detections
from detection.nn.nms import grouped_nms, rank_in_group, sort_by_group
from ssd.anchors import Anchors
from ssd.box_coder import decode

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

    keep = grouped_nms(boxes, group, nms_threshold, drop_equal=True)
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
