"""Detections matched to the ground truth of their image, by box.

In NumPy, so that commands on the files of a run need no torch, whose import takes longer than they do.

N images, G ground-truth boxes, D detections of one image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detection.data.coco import Split
from detection.data.rle import CocoRle

MATCH_IOU = 0.5


@dataclass(frozen=True)
class ImageDetections:
    """Detections of one image of a split.

    boxes_xyxy: (D, 4) pixels, with scores (D,), labels (D,) and D masks or None, by descending score.
    """

    index: int
    boxes_xyxy: NDArray[np.float64]
    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    masks: Sequence[CocoRle | None]


@dataclass(frozen=True)
class ImageMatches(ImageDetections):
    """Detections of one image, matched to its ground truth.

    is_matched: (G,) whether a detection matches the object. is_false_positive: (D,) whether the detection matches
    nothing. is_object: (G,) all but crowds.
    """

    is_matched: NDArray[np.bool_]
    is_false_positive: NDArray[np.bool_]
    is_object: NDArray[np.bool_]
    largest_missed_px: float
    """Area of the largest missed object."""

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall: 1 if all objects and nothing else were detected."""
        num_matched = int(self.is_matched.sum())
        return 2 * num_matched / max(1, int(self.is_object.sum()) + len(self.scores))

    @property
    def caption(self) -> str:
        """Summary for the caption."""
        total, missed = int(self.is_object.sum()), int((self.is_object & ~self.is_matched).sum())
        return f"{total - missed} of {total} objects found, {self.is_false_positive.sum()} false"


def pick_threshold(split: Split, detections: Sequence[dict[str, Any]]) -> float:
    """Return the score threshold that keeps as many detections as there are objects."""
    scores = sorted((row["score"] for row in detections), reverse=True)
    num_objects = int((~split.is_crowd).sum())
    return float(scores[min(num_objects, len(scores)) - 1]) if scores and num_objects else 0.0


def group_by_image(split: Split, detections: Sequence[dict[str, Any]], min_score: float) -> Iterator[ImageDetections]:
    """Yield the detections of at least `min_score` of each image in turn, some without any.

    detections: rows in COCO's results format.
    """
    labels = {category.id: label for label, category in enumerate(split.categories, start=1)}
    by_image: dict[int, list[dict[str, Any]]] = {}
    for row in detections:
        if row["score"] >= min_score:
            by_image.setdefault(row["image_id"], []).append(row)
    for index, image_id in enumerate(split.image_ids.tolist()):
        rows = sorted(by_image.get(image_id, []), key=lambda row: -row["score"])
        boxes = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        yield ImageDetections(
            index,
            boxes,
            scores=np.array([row["score"] for row in rows], dtype=np.float64),
            labels=np.array([labels.get(row["category_id"], 0) for row in rows], dtype=np.int64),
            masks=[row.get("segmentation") for row in rows],
        )


def match_images(split: Split, detections: Sequence[dict[str, Any]], min_score: float) -> Iterator[ImageMatches]:
    """Yield the matches of each image that has ground truth or detections of at least `min_score`."""
    for image in group_by_image(split, detections, min_score):
        if len(image.scores) or len(split.boxes(image.index)):
            yield match_boxes(split, image)


def match_boxes(split: Split, image: ImageDetections) -> ImageMatches:
    """Match detections, by descending score, to the free object of their class with the highest IoU of at least 0.5.

    A detection with at least half of its area in a crowd of its class is not a false positive.
    """
    iou, in_crowd = object_iou(split, image)
    same_label = image.labels[:, None] == split.image_labels(image.index)[None]
    matched = match_greedily(np.where(same_label & (iou >= MATCH_IOU), iou, 0.0))
    is_matched = np.zeros(iou.shape[1], dtype=bool)
    is_matched[matched[matched >= 0]] = True
    is_crowd = crowds(split, image.index)
    gt_boxes_xyxy = split.boxes(image.index).astype(np.float64)
    sides = gt_boxes_xyxy[:, 2:] - gt_boxes_xyxy[:, :2]
    missed_px = (sides[:, 0] * sides[:, 1])[~is_matched & ~is_crowd]
    return ImageMatches(
        **vars(image),
        is_matched=is_matched,
        is_false_positive=(matched < 0) & ~in_crowd,
        is_object=~is_crowd,
        largest_missed_px=float(missed_px.max(initial=0.0)),
    )


def object_iou(split: Split, image: ImageDetections) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the IoU of each detection with each object (D, G), 0 for crowds, and whether it lies in a crowd (D,).

    In a crowd: at least half of its area is in a crowd of its class.
    """
    intersection, union, areas = pairwise_intersection(image.boxes_xyxy, split.boxes(image.index).astype(np.float64))
    is_crowd = crowds(split, image.index)
    same_label = image.labels[:, None] == split.image_labels(image.index)[None]
    in_crowd = (same_label & is_crowd & (intersection >= MATCH_IOU * areas)).any(axis=1)
    return np.where(is_crowd, 0.0, intersection / np.maximum(union, 1e-9)), in_crowd


def crowds(split: Split, index: int) -> NDArray[np.bool_]:
    """Return whether each ground-truth box of an image is a crowd, (G,)."""
    return split.is_crowd[split.box_offsets[index] : split.box_offsets[index + 1]]


def match_greedily(priority: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the object that each detection matches (D,), or -1.

    Each in turn takes the free object of its highest priority (D, G) above 0.
    """
    matched = np.full(len(priority), -1, dtype=np.int64)
    is_free = np.ones(priority.shape[1], dtype=bool)
    for row in np.flatnonzero(priority.max(axis=1, initial=0.0) > 0):
        candidates = priority[row] * is_free
        best = int(candidates.argmax())
        if candidates[best] > 0:
            matched[row], is_free[best] = best, False
    return matched


def pairwise_intersection(
    a_xyxy: NDArray[np.float64], b_xyxy: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return intersection (N, M) and union (N, M) of boxes (N, 4) and (M, 4), and the areas (N, 1) of the first."""
    lower = np.maximum(a_xyxy[:, None, :2], b_xyxy[None, :, :2])
    upper = np.minimum(a_xyxy[:, None, 2:], b_xyxy[None, :, 2:])
    intersection = (upper - lower).clip(min=0).prod(axis=2)
    areas = (a_xyxy[:, 2:] - a_xyxy[:, :2]).prod(axis=1)[:, None]
    union = areas + (b_xyxy[:, 2:] - b_xyxy[:, :2]).prod(axis=1)[None] - intersection
    return intersection, union, areas
