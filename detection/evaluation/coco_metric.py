"""COCO's twelve metrics for boxes and masks: hotcoco during a run, pycocotools for the final result."""

import contextlib
import importlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.config.settings import InputError
from detection.data import coco_arrays, coco_json
from detection.data.coco import Split
from detection.data.rle import CocoRle

COCO_STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

# Metrics of each category: IoU thresholds, recalls and object sizes of their precisions in the libraries' results.
_ALL = slice(None)
CLASS_METRICS = {
    "AP": (_ALL, _ALL, 0),
    "AP50": (0, _ALL, 0),
    "AP75": (5, _ALL, 0),
    "APs": (_ALL, _ALL, 1),
    "APm": (_ALL, _ALL, 2),
    "APl": (_ALL, _ALL, 3),
}
CURVES = {"precision50": 0, "precision75": 5}  # their IoU thresholds

# Columns of a row of detections. Boxes are left, top, width, height in pixels of the original image. Images and
# categories are numbered as in the split, because float64 does not hold every id.
RESULT_COLUMNS = ("image_index", "x", "y", "width", "height", "score", "label")


class CocoBoxMetric:
    """Box metrics over all images of a split, which are those with a file.

    backend: "pycocotools" is the official library. "hotcoco" is 20 to 100 times as fast, with bit-identical metrics.
    "auto" is hotcoco if it is installed. Raise InputError if hotcoco is requested but not installed.
    """

    segmentations: ClassVar[bool] = False
    """True if the ground truth has masks."""

    def __init__(self, split: Split, backend: str = "pycocotools"):
        gt = dense_ground_truth(split, self.segmentations)
        self.metric_ids = metric_image_ids(split)
        fast = None if backend == "pycocotools" else load_hotcoco(gt, required=backend == "hotcoco")
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco_gt, self.coco_eval_class = fast or (load_pycocotools(gt), COCOeval)
        self.last_eval: Any = None
        """Evaluation object of the last results, None if they were empty."""

    def __call__(self, rows: NDArray[np.float64]) -> dict[str, float]:
        """Return the metrics of detections (D, 7), columns as in `RESULT_COLUMNS`.

        Images without detections count as well. A metric is -1 if no ground-truth box has its size. AP is over IoU 0.50
        to 0.95, AR100 with 100 detections per image.
        """
        rows = rows.copy()
        rows[:, 0] = self.metric_ids[rows[:, 0].astype(np.int64)]
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
        """Return the metrics of each category for classes.json (docs/RUN_FOLDER.md), from the last results.

        Crowds are not counted. A metric is None without objects of its size. Precisions are those at the recalls 0,
        0.01, ..., 1.
        """
        num_objects = Counter(a["category_id"] for a in self.coco_gt.dataset["annotations"] if not a.get("iscrowd"))
        categories = sorted(self.coco_gt.dataset["categories"], key=lambda row: row["id"])
        # (IoU thresholds, recalls, categories, sizes), with 100 detections per image. -1 means no object.
        precisions: NDArray[np.float64] = np.zeros((10, 101, len(categories), 4))
        if self.last_eval is not None:
            precisions = np.asarray(self.last_eval.eval["precision"])[..., -1]
        rows: list[dict[str, object]] = []
        for category, precision in zip(categories, np.moveaxis(precisions, 2, 0), strict=True):
            count = num_objects[category["id"]]
            if not count:
                precision = np.full_like(precision, -1)
            metrics = {name: _mean_precision(precision[selected]) for name, selected in CLASS_METRICS.items()}
            curves = {name: precision[iou, :, 0].round(3).tolist() if count else [] for name, iou in CURVES.items()}
            rows.append({"name": category["name"], "objects": count, **metrics, **curves})
        return rows


class CocoMaskMetric(CocoBoxMetric):
    """Box and mask metrics over all images of a split, as `CocoBoxMetric`."""

    segmentations = True

    def compute_masks(self, rows: NDArray[np.float64], masks: Sequence[CocoRle]) -> dict[str, float]:
        """Return the mask metrics of detections (D, 7), columns as in `RESULT_COLUMNS`, and their D masks."""
        # The boxes are left out: the libraries would take small, medium and large from their areas.
        results = [
            {"image_id": image_id, "category_id": int(row[6]), "segmentation": mask, "score": row[5]}
            for image_id, row, mask in zip(
                self.metric_ids[rows[:, 0].astype(np.int64)].tolist(), rows.tolist(), masks, strict=True
            )
        ]
        return self.compute(results, "segm")


def _mean_precision(precision: NDArray[np.float64]) -> float | None:
    """Return the mean of the precisions, None if there is no object."""
    return float(precision[precision > -1].mean()) if (precision > -1).any() else None


def metric_image_ids(split: Split) -> NDArray[np.int64]:
    """Return the metric's id of each image of a split: 1 to N in ascending order of the file's ids.

    The libraries rank detections of equal scores by image id, so the order decides ties as the file's ids do.
    """
    ids = np.empty(len(split), dtype=np.int64)
    ids[np.argsort(split.image_ids)] = np.arange(1, len(split) + 1)
    return ids


def dense_ground_truth(split: Split, segmentations: bool) -> dict[str, list[dict[str, Any]]]:
    """Return the annotations of a split's images in COCO's format, with ids from 1 on for all objects.

    pycocotools treats a match with an annotation of id 0 as no match, and rounds ids above 2^53.
    """
    columns = coco_arrays.read(split.annotation_file, segmentations)
    box_image, has_image = coco_json.lookup(columns.box_image_ids, split.image_ids)
    category_index, _ = coco_json.lookup(columns.box_category_ids, np.array([c.id for c in split.categories]))
    ids = metric_image_ids(split)
    kept = np.flatnonzero(has_image)
    values = zip(
        ids[box_image[kept]].tolist(),
        (1 + category_index[kept]).tolist(),
        columns.boxes_xywh[kept].tolist(),
        columns.areas[kept].tolist(),
        (columns.is_crowd[kept] != 0).astype(int).tolist(),
        strict=True,
    )
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
    annotations = [{"id": i, **dict(zip(keys, row, strict=True))} for i, row in enumerate(values, start=1)]
    if segmentations:
        for annotation, row in zip(annotations, kept.tolist(), strict=True):
            mask = columns.segmentations[row]
            annotation["segmentation"] = msgspec.json.decode(mask) if isinstance(mask, msgspec.Raw) else mask
    return {
        "images": [
            {"id": image_id, "file_name": "", "height": height, "width": width}
            for image_id, (height, width) in zip(ids.tolist(), split.sizes_hw.tolist(), strict=True)
        ],
        "annotations": annotations,
        "categories": [{"id": label, "name": c.name} for label, c in enumerate(split.categories, start=1)],
    }


def load_pycocotools(gt: dict[str, list[dict[str, Any]]]) -> COCO:
    """Return pycocotools' annotations."""
    coco_gt = COCO()
    coco_gt.dataset = gt
    coco_gt.createIndex()
    return coco_gt


def load_hotcoco(gt: dict[str, list[dict[str, Any]]], required: bool) -> tuple[Any, Any] | None:
    """Return hotcoco's annotations and evaluation class, or None if it is missing or rejects a mask."""
    try:
        hotcoco = importlib.import_module("hotcoco")
    except ImportError as error:
        if required:
            raise InputError(
                f"--coco-eval-backend hotcoco: {error}. Install it, or pass --coco-eval-backend auto."
            ) from error
        return None
    try:
        return hotcoco.COCO(gt), hotcoco.COCOeval
    except ValueError:
        return None


def from_results(results: Sequence[Mapping[str, Any]], split: Split) -> NDArray[np.float64]:
    """Convert detections in COCO's results format to rows (D, 7), columns as in `RESULT_COLUMNS`.

    Raises KeyError for an image or category that the split does not have.
    """
    image_index = {image_id: index for index, image_id in enumerate(split.image_ids.tolist())}
    label = {category.id: label for label, category in enumerate(split.categories, start=1)}
    rows = [(image_index[r["image_id"]], *r["bbox"], r["score"], label[r["category_id"]]) for r in results]
    return np.array(rows, dtype=np.float64).reshape(-1, len(RESULT_COLUMNS))


def to_results(rows: NDArray[np.float64], split: Split) -> list[dict[str, object]]:
    """Convert detections (D, 7) to COCO's results format, with the ids of the annotation file."""
    return [
        {
            "image_id": int(split.image_ids[int(row[0])]),
            "category_id": split.categories[int(row[6]) - 1].id,
            "bbox": [round(float(side), 2) for side in row[1:5]],
            "score": round(float(row[5]), 5),
        }
        for row in rows
    ]


def to_mask_results(rows: NDArray[np.float64], masks: Sequence[CocoRle], split: Split) -> list[dict[str, object]]:
    """Convert the masks of detections (D, 7) to COCO's results format, with the ids of the annotation file."""
    return [
        {
            "image_id": int(split.image_ids[int(row[0])]),
            "category_id": split.categories[int(row[6]) - 1].id,
            "segmentation": mask,
            "score": round(float(row[5]), 5),
        }
        for row, mask in zip(rows, masks, strict=True)
    ]
