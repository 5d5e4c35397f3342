"""Confusion matrix over all score thresholds at once.

A detection matches an object of any class at IoU 0.5, its own class first. Since matching goes by descending score, a
lower threshold changes no match above it. Counts by score are therefore the matrix at every threshold.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from detection.data.coco import Split
from detection.evaluation.matching import MATCH_IOU, group_by_image, match_greedily, object_iou

SCORE_BINS = 20
BACKGROUND = 0


def count_confusions(split: Split, detections: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts of confusion.json (docs/RUN_FOLDER.md) for detections in COCO's results format."""
    counts: Counter[tuple[int, int, int]] = Counter()
    for image in group_by_image(split, detections, 1 / SCORE_BINS):
        iou, in_crowd = object_iou(split, image)
        gt_labels = split.image_labels(image.index)
        same_label = image.labels[:, None] == gt_labels[None]
        matched = match_greedily(np.where(iou >= MATCH_IOU, iou + same_label, 0.0))
        labels = np.append(gt_labels, BACKGROUND)[matched]  # the last one is that of -1
        bins = (image.scores * SCORE_BINS).astype(np.int64).clip(max=SCORE_BINS - 1)
        kept = (matched >= 0) | ~in_crowd
        counts.update(zip(labels[kept].tolist(), image.labels[kept].tolist(), bins[kept].tolist(), strict=True))
    objects = np.bincount(split.labels[~split.is_crowd], minlength=len(split.categories) + 1)[1:]
    return {
        "classes": [category.name for category in split.categories],
        "objects": objects.tolist(),
        "score_bins": SCORE_BINS,
        "counts": [[*key, count] for key, count in sorted(counts.items())],
    }
