"""COCO's twelve figures for boxes and masks: by a fast library during a run, by the official one for its last word."""

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
from detection.data.rle import CompressedMask

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

# Columns of a row of detections: boxes are left, top, width, height in pixels of the original image.
ROW = ("image_id", "x", "y", "width", "height", "score", "category_id")


class BoxMetric:
    """The metric of one annotation file, over all of its images.

    library: "pycocotools", the official one; "hotcoco", which gives the same twelve numbers bit for bit, 20 to 100
    times as fast; or "auto", hotcoco where it is installed. InputError where a library is asked for and absent.
    """

    def __init__(self, annotation_file: Path, library: str = "pycocotools"):
        fast = None if library == "pycocotools" else open_fast(annotation_file, required=library == "hotcoco")
        with contextlib.redirect_stdout(io.StringIO()):
            self.truth, self.evaluation = fast or (COCO(str(annotation_file)), COCOeval)
        self.last: Any = None
        """The library's evaluation of the last rows, None where there were none."""

    def __call__(self, rows: NDArray[np.float64]) -> dict[str, float]:
        """The figures of detections (D, 7), columns as in `ROW`; -1 where the truth has no box of that size.

        Images without detections count as well. AP is over IoU .50 to .95, AR100 with 100 detections an image.
        """
        return self.figures(rows, "bbox")

    def figures(self, results: Any, kind: Literal["bbox", "segm"]) -> dict[str, float]:
        """The figures of results as the libraries take them."""
        self.last = None
        if not len(results):
            return dict.fromkeys(FIGURES, 0.0)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = self.evaluation(self.truth, self.truth.loadRes(results), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        self.last = evaluation
        return dict(zip(FIGURES, map(float, evaluation.stats), strict=True))

    def by_class(self) -> list[dict[str, object]]:
        """Of each category its name, the AP of the last rows and how many objects the truth has.

        Crowds are no objects. AP is None where there are none.
        """
        objects = Counter(a["category_id"] for a in self.truth.dataset["annotations"] if not a.get("iscrowd"))
        found: list[dict[str, object]] = []
        for index, category in enumerate(sorted(self.truth.dataset["categories"], key=lambda row: row["id"])):
            ap = 0.0
            if self.last is not None:
                # (IoU thresholds, recalls, categories, sizes, limits): all sizes, 100 an image; -1 is no object
                precision = self.last.eval["precision"][:, :, index, 0, -1]
                ap = float(precision[precision > -1].mean()) if (precision > -1).any() else -1.0
            count = objects[category["id"]]
            found.append({"name": category["name"], "AP": ap if count and ap >= 0 else None, "objects": count})
        return found


class MaskMetric(BoxMetric):
    """The metric of one annotation file for boxes, and for masks."""

    def masks(self, rows: NDArray[np.float64], masks: Sequence[CompressedMask]) -> dict[str, float]:
        """The figures of the masks of detections: rows (D, 7) as in `ROW`, whose boxes do not count, and D masks."""
        # Without boxes: with them, small, medium and large would go by the boxes' areas.
        results = [
            {"image_id": int(row[0]), "category_id": int(row[6]), "segmentation": mask, "score": row[5]}
            for row, mask in zip(rows.tolist(), masks, strict=True)
        ]
        return self.figures(results, "segm")


def open_fast(annotation_file: Path, required: bool) -> tuple[Any, Any] | None:
    """The annotations and the evaluation of hotcoco, or None where it would not give the official figures.

    It insists on the types of fields that no figure depends on, and differs where an annotation has the id 0:
    pycocotools takes a match with that one for none.
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
        truth = hotcoco.COCO(str(annotation_file))
    except ValueError:
        return None
    return None if 0 in truth.getAnnIds() else (truth, hotcoco.COCOeval)


def to_results(rows: NDArray[np.float64]) -> list[dict[str, object]]:
    """Detections (D, 7) as the list of COCO's results format."""
    return [
        {
            "image_id": int(row[0]),
            "category_id": int(row[6]),
            "bbox": [round(float(side), 2) for side in row[1:5]],
            "score": round(float(row[5]), 5),
        }
        for row in rows
    ]


def to_mask_results(rows: NDArray[np.float64], masks: Sequence[CompressedMask]) -> list[dict[str, object]]:
    """The masks of detections (D, 7) as the list of COCO's results format."""
    return [
        {
            "image_id": int(row[0]),
            "category_id": int(row[6]),
            "segmentation": mask,
            "score": round(float(row[5]), 5),
        }
        for row, mask in zip(rows, masks, strict=True)
    ]
