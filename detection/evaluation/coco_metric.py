"""COCO's twelve metrics for boxes and masks: hotcoco during a run, pycocotools for the final result."""

import contextlib
import importlib
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.config.settings import InputError
from detection.data.rle import CocoRle

COCO_STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

# Columns of a row of detections. Boxes are left, top, width, height in pixels of the original image.
RESULT_COLUMNS = ("image_id", "x", "y", "width", "height", "score", "category_id")


class CocoBoxMetric:
    """Box metrics over all images of one annotation file.

    backend: "pycocotools" is the official library. "hotcoco" is 20 to 100 times as fast, with bit-identical metrics.
    "auto" is hotcoco if it is installed. Raise InputError if hotcoco is requested but not installed.
    """

    def __init__(self, annotation_file: Path, backend: str = "pycocotools"):
        fast = None if backend == "pycocotools" else load_hotcoco(annotation_file, required=backend == "hotcoco")
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco_gt, self.coco_eval_class = fast or (COCO(str(annotation_file)), COCOeval)
        self.last_eval: Any = None
        """Evaluation object of the last results, None if they were empty."""

    def __call__(self, rows: NDArray[np.float64]) -> dict[str, float]:
        """Return the metrics of detections (D, 7), columns as in `RESULT_COLUMNS`.

        Images without detections count as well. A metric is -1 if no ground-truth box has its size. AP is over IoU 0.50
        to 0.95, AR100 with 100 detections per image.
        """
        return self.compute(rows, "bbox")

    def compute(self, results: Any, iou_type: Literal["bbox", "segm"]) -> dict[str, float]:
        """Return the metrics of results in any form that the libraries accept."""
        self.last_eval = None
        if not len(results):
            return dict.fromkeys(COCO_STATS, 0.0)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = self.coco_eval_class(self.coco_gt, self.coco_gt.loadRes(results), iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        self.last_eval = evaluation
        return dict(zip(COCO_STATS, map(float, evaluation.stats), strict=True))

    def per_class_ap(self) -> list[dict[str, object]]:
        """Return the name, the AP of the last rows and the number of ground-truth objects of each category.

        Crowds are not counted. AP is None for a category without objects.
        """
        num_objects = Counter(a["category_id"] for a in self.coco_gt.dataset["annotations"] if not a.get("iscrowd"))
        rows: list[dict[str, object]] = []
        for index, category in enumerate(sorted(self.coco_gt.dataset["categories"], key=lambda row: row["id"])):
            ap = 0.0
            if self.last_eval is not None:
                # (IoU thresholds, recalls, categories, sizes, limits): all sizes, 100 per image. -1 means no object.
                precision = self.last_eval.eval["precision"][:, :, index, 0, -1]
                ap = float(precision[precision > -1].mean()) if (precision > -1).any() else -1.0
            count = num_objects[category["id"]]
            rows.append({"name": category["name"], "AP": ap if count and ap >= 0 else None, "objects": count})
        return rows


class CocoMaskMetric(CocoBoxMetric):
    """Box and mask metrics over all images of one annotation file."""

    def compute_masks(self, rows: NDArray[np.float64], masks: Sequence[CocoRle]) -> dict[str, float]:
        """Return the mask metrics of detections (D, 7), columns as in `RESULT_COLUMNS`, and their D masks."""
        # The boxes are left out: the libraries would take small, medium and large from their areas.
        results = [
            {"image_id": int(row[0]), "category_id": int(row[6]), "segmentation": mask, "score": row[5]}
            for row, mask in zip(rows.tolist(), masks, strict=True)
        ]
        return self.compute(results, "segm")


def load_hotcoco(annotation_file: Path, required: bool) -> tuple[Any, Any] | None:
    """Return hotcoco's annotations and evaluation class, or None if its metrics would not be the official ones.

    hotcoco requires the types of fields that no metric depends on. Its metrics differ if an annotation has the id 0:
    pycocotools treats a match with that annotation as no match.
    """
    try:
        hotcoco = importlib.import_module("hotcoco")
    except ImportError as error:
        if required:
            raise InputError(
                f"--coco-eval-backend hotcoco: {error}. Install it, or pass --coco-eval-backend auto."
            ) from error
        return None
    try:
        coco_gt = hotcoco.COCO(str(annotation_file))
    except ValueError:
        return None
    return None if 0 in coco_gt.getAnnIds() else (coco_gt, hotcoco.COCOeval)


def to_results(rows: NDArray[np.float64]) -> list[dict[str, object]]:
    """Convert detections (D, 7) to COCO's results format."""
    return [
        {
            "image_id": int(row[0]),
            "category_id": int(row[6]),
            "bbox": [round(float(side), 2) for side in row[1:5]],
            "score": round(float(row[5]), 5),
        }
        for row in rows
    ]


def to_mask_results(rows: NDArray[np.float64], masks: Sequence[CocoRle]) -> list[dict[str, object]]:
    """Convert the masks of detections (D, 7) to COCO's results format."""
    return [
        {
            "image_id": int(row[0]),
            "category_id": int(row[6]),
            "segmentation": mask,
            "score": round(float(row[5]), 5),
        }
        for row, mask in zip(rows, masks, strict=True)
    ]
