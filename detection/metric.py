"""COCO's twelve figures for boxes, by the official API."""

import contextlib
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

# Columns of a row of detections: boxes are left, top, width, height in pixels of the original image.
ROW = ("image_id", "x", "y", "width", "height", "score", "category_id")


class BoxMetric:
    """The metric of one annotation file, over all of its images."""

    def __init__(self, annotation_file: Path):
        with contextlib.redirect_stdout(io.StringIO()):
            self.truth = COCO(str(annotation_file))

    def __call__(self, rows: NDArray[np.float64]) -> dict[str, float]:
        """The figures of detections (D, 7), columns as in `ROW`; -1 where the truth has no box of that size.

        Images without detections count as well. AP is over IoU .50 to .95, AR100 with 100 detections an image.
        """
        if not len(rows):
            return dict.fromkeys(FIGURES, 0.0)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self.truth, self.truth.loadRes(rows), iouType="bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return dict(zip(FIGURES, map(float, evaluation.stats), strict=True))


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
