"""Made-up predictions and detections, around a truth: what detection and the metric are measured on.

B images, A anchors, K classes with background 0.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detection.boxes import pairwise_iou, xyxy_to_cxcywh
from detection.data.coco import Split
from detection.evaluation.coco_metric import RESULT_COLUMNS
from ssd.anchors import NUM_ANCHORS, Anchors
from ssd.box_coder import to_deltas

# Of the detections of an image, the share that lies around boxes of the truth, and of those the share of its class.
NEAR_GT, RIGHT_CLASS = 0.33, 0.7
MIN_SIDE_PX = 2.0


@dataclass(frozen=True)
class SyntheticScores:
    """What the scores of a network look like.

    background: the lead of its logit. spots: places of an image where a class has more than noise, each with the
    anchors that overlap it by `iou`; their logit there is `peak`, give or take `spread`, and their boxes have moved
    towards the spot by the share `pull`.
    """

    background: float
    num_objects: int
    iou: float
    peak: float
    logit_std: float
    box_pull: float


TRAINED = SyntheticScores(background=9.0, num_objects=140, iou=0.45, peak=8.0, logit_std=1.5, box_pull=0.8)
"""Objects and what is taken for one, each seen by the anchors around it, which agree on its box.

As many as the MLPerf reference takes as long for as for its own network when trained, 14 ms an image: 95 detections.
(A network of three classes, trained on BCCD: 370 candidates above .05 an image, of which 38 stay.)
"""
EARLY = SyntheticScores(background=6.5, num_objects=0, iou=1.0, peak=0.0, logit_std=0.0, box_pull=0.0)
"""Noise, of which hundreds pass the threshold, in most classes, with boxes that are still those of the anchors.

As after ten steps on 80 photos of COCO: 675 candidates an image in 73 classes, of which 618 stay.
"""


class Predictions(NamedTuple):
    """Deltas (B, A, 4) and logits (B, A, K)."""

    deltas: Tensor
    logits: Tensor


def predict(scores: SyntheticScores, gt: Split, anchors: Anchors, num_images: int, seed: int) -> Predictions:
    """Predictions in float32 on the CPU; spots have the places and labels of the truth."""
    rng = np.random.default_rng(seed)
    shape = (num_images, NUM_ANCHORS, 4 + gt.num_classes)  # a fused head's output, of which the network gives views
    together = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    deltas, logits = together[..., :4], together[..., 4:]
    deltas *= 0.3
    logits[..., 0] += scores.background
    boxes_px, size_px = gt.boxes_xyxy, np.repeat(gt.sizes_hw[:, ::-1], np.diff(gt.box_offsets), axis=0)
    for image in range(num_images if scores.num_objects else 0):
        rows = rng.integers(0, len(boxes_px), scores.num_objects)
        boxes = torch.from_numpy((boxes_px[rows] / np.tile(size_px[rows], 2)).astype(np.float32))
        labels = torch.from_numpy(gt.labels[rows])
        overlap, spot = pairwise_iou(boxes, anchors.boxes_xyxy).max(dim=0)
        (here,) = (overlap > scores.iou).nonzero(as_tuple=True)
        noise = torch.from_numpy(rng.standard_normal(len(here), dtype=np.float32))
        logits[image, here, labels[spot[here]]] = scores.peak + scores.logit_std * noise
        deltas[image, here] += scores.box_pull * to_deltas(xyxy_to_cxcywh(boxes)[spot], anchors)[here]
    return Predictions(deltas, logits)


def make_rows(gt: Split, per_image: int, seed: int) -> NDArray[np.float64]:
    """Detections (D, 7), columns as in `coco_metric.RESULT_COLUMNS`, `per_image` of each image.

    Those that are near no box of the truth are anywhere, of any class: a network under training is as generous.
    """
    rng = np.random.default_rng(seed)
    category_ids = np.array([category.id for category in gt.categories])
    near = round(per_image * NEAR_GT)
    rows = np.empty((len(gt), per_image, len(RESULT_COLUMNS)))
    rows[:, :, 0] = gt.image_ids[:, None]
    rows[:, :, 5] = rng.beta(1, 4, rows.shape[:2])
    rows[:, :, 6] = rng.choice(category_ids, rows.shape[:2])
    sizes_wh = np.tile(gt.sizes_hw[:, None, ::-1], 2)
    rows[:, :, 1:5] = rng.random((*rows.shape[:2], 4)) * sizes_wh * (1, 1, 0.3, 0.3)
    for index in range(len(gt)):
        boxes = gt.boxes(index).astype(np.float64)
        if not len(boxes):
            continue
        picked = rng.integers(0, len(boxes), near)
        sides = boxes[picked, 2:] - boxes[picked, :2]
        rows[index, :near, 1:5] = np.concatenate([boxes[picked, :2], sides], axis=1)
        rows[index, :near, 1:5] += rng.normal(0, 0.1, (near, 4)) * np.tile(sides, 2)
        right = rng.random(near) < RIGHT_CLASS
        rows[index, :near, 6][right] = category_ids[gt.image_labels(index)[picked[right]] - 1]
    rows[:, :, 3:5] = rows[:, :, 3:5].clip(MIN_SIDE_PX)
    return rows.reshape(-1, len(RESULT_COLUMNS))
