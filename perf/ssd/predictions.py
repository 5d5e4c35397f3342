"""Synthetic predictions and detections around ground truth, for benchmarks of detection and the metric.

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

# Fraction of an image's detections that lie near ground-truth boxes, and fraction of those with the right class.
NEAR_GT, RIGHT_CLASS = 0.33, 0.7
MIN_SIDE_PX = 2.0


@dataclass(frozen=True)
class SyntheticScores:
    """Parameters of a network's synthetic scores.

    background: mean logit of the background, which is 0 for all other classes. num_objects: objects per image.
    iou: minimum overlap of an anchor that detects an object. peak, logit_std: mean and standard deviation of its logit.
    box_pull: fraction of the way from the anchor to the object that its box moves.
    """

    background: float
    num_objects: int
    iou: float
    peak: float
    logit_std: float
    box_pull: float


TRAINED = SyntheticScores(background=9.0, num_objects=140, iou=0.45, peak=8.0, logit_std=1.5, box_pull=0.8)
"""Objects, and regions mistaken for one, each detected by the anchors around it, which agree on its box.

With this many objects the MLPerf reference takes as long as for its own trained network: 14 ms and 95 detections per
image. (A network of three classes trained on BCCD: 370 candidates above 0.05 per image, of which 38 remain.)
"""
EARLY = SyntheticScores(background=6.5, num_objects=0, iou=1.0, peak=0.0, logit_std=0.0, box_pull=0.0)
"""Noise, of which hundreds pass the threshold in most classes, with boxes close to the anchors.

Similar to a network after ten steps on 80 photos of COCO: 675 candidates per image in 73 classes, of which 618 remain.
"""


class Predictions(NamedTuple):
    """Deltas (B, A, 4) and logits (B, A, K)."""

    deltas: Tensor
    logits: Tensor


def predict(scores: SyntheticScores, gt: Split, anchors: Anchors, num_images: int, seed: int) -> Predictions:
    """Return predictions in float32 on the CPU. Objects have boxes and labels of the ground truth."""
    rng = np.random.default_rng(seed)
    shape = (num_images, NUM_ANCHORS, 4 + gt.num_classes)  # output of a fused head, of which the network returns views
    fused = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    deltas, logits = fused[..., :4], fused[..., 4:]
    deltas *= 0.3
    logits[..., 0] += scores.background
    boxes_px, size_px = gt.boxes_xyxy, np.repeat(gt.sizes_hw[:, ::-1], np.diff(gt.box_offsets), axis=0)
    for image in range(num_images if scores.num_objects else 0):
        rows = rng.integers(0, len(boxes_px), scores.num_objects)
        boxes = torch.from_numpy((boxes_px[rows] / np.tile(size_px[rows], 2)).astype(np.float32))
        labels = torch.from_numpy(gt.labels[rows])
        iou, matched = pairwise_iou(boxes, anchors.boxes_xyxy).max(dim=0)
        (positive,) = (iou > scores.iou).nonzero(as_tuple=True)
        noise = torch.from_numpy(rng.standard_normal(len(positive), dtype=np.float32))
        logits[image, positive, labels[matched[positive]]] = scores.peak + scores.logit_std * noise
        deltas[image, positive] += scores.box_pull * to_deltas(xyxy_to_cxcywh(boxes)[matched], anchors)[positive]
    return Predictions(deltas, logits)


def make_rows(gt: Split, per_image: int, seed: int) -> NDArray[np.float64]:
    """Return detections (D, 7), `per_image` of each image, with the columns of `coco_metric.RESULT_COLUMNS`.

    Detections that are not near a ground-truth box have random places and classes, as early in training.
    """
    rng = np.random.default_rng(seed)
    num_near = round(per_image * NEAR_GT)
    rows = np.empty((len(gt), per_image, len(RESULT_COLUMNS)))
    rows[:, :, 0] = np.arange(len(gt))[:, None]
    rows[:, :, 5] = rng.beta(1, 4, rows.shape[:2])
    rows[:, :, 6] = rng.choice(np.arange(1, gt.num_classes), rows.shape[:2])
    sizes_wh = np.tile(gt.sizes_hw[:, None, ::-1], 2)
    rows[:, :, 1:5] = rng.random((*rows.shape[:2], 4)) * sizes_wh * (1, 1, 0.3, 0.3)
    for index in range(len(gt)):
        boxes = gt.boxes(index).astype(np.float64)
        if not len(boxes):
            continue
        picked = rng.integers(0, len(boxes), num_near)
        sides = boxes[picked, 2:] - boxes[picked, :2]
        rows[index, :num_near, 1:5] = np.concatenate([boxes[picked, :2], sides], axis=1)
        rows[index, :num_near, 1:5] += rng.normal(0, 0.1, (num_near, 4)) * np.tile(sides, 2)
        is_right = rng.random(num_near) < RIGHT_CLASS
        rows[index, :num_near, 6][is_right] = gt.image_labels(index)[picked[is_right]]
    rows[:, :, 3:5] = rows[:, :, 3:5].clip(MIN_SIDE_PX)
    return rows.reshape(-1, len(RESULT_COLUMNS))
