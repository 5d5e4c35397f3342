"""Evaluator of workloads that detect boxes: detections on all evaluation images, then COCO's metrics.

Each rank processes its part of the images. The main rank gathers the detections of all ranks and computes the metrics.

Shapes: B images, D detections.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from detection.config.run_config import RunConfig
from detection.data.coco import Split
from detection.data.eval_source import CocoEvalSource, OtherEvaluation
from detection.data.prefetch import prefetch, to_device
from detection.evaluation.coco_metric import RESULT_COLUMNS, CocoBoxMetric, to_results
from detection.nn.detections import Detections
from detection.runtime.device import supports_float64
from detection.runtime.distributed import DistContext


class BoxEvalSource(CocoEvalSource):
    """Evaluation images of a run, as `CocoEvalSource`, and the metric over their boxes on the main rank."""

    def __init__(
        self, val: Split, order: NDArray[np.intp], dataset: Dataset[Any], config: RunConfig, ranks: DistContext
    ):
        super().__init__(val, order, dataset, config, ranks)
        self.metric = CocoBoxMetric(val, config.coco_eval_backend) if ranks.is_main and val.is_labeled else None


class BoxEvaluator:
    """Evaluator of boxes. A workload defines `predict` and `scales_wh`.

    result_rows: detections of the last evaluation, (N, 7) in the columns of `coco_metric.RESULT_COLUMNS`. per_class_ap:
    AP of each category, set by `verify_official`.
    """

    val: Split

    def __init__(self, ranks: DistContext):
        self.ranks = ranks
        self.result_rows: NDArray[np.float64] = np.zeros((0, len(RESULT_COLUMNS)))
        self.per_class_ap: list[dict[str, object]] = []

    def predict(self, model: nn.Module, batch: Any) -> Detections:
        """Return the detections in a batch on the device."""
        raise NotImplementedError

    def scales_wh(self, batch: Any) -> Tensor:
        """Return the factors (B, 2) from the boxes of `predict` to pixels of the original images."""
        raise NotImplementedError

    def __call__(self, model: nn.Module, data: BoxEvalSource) -> dict[str, float]:
        """Return COCO's metrics over the evaluation images of all ranks. Every rank gets the same numbers."""
        self.val = data.val
        self.result_rows = self.detect_all(model, data, data.eval_batches())
        return self.compute_metrics(self.result_rows, data)

    def evaluate_other(self, model: nn.Module, data: BoxEvalSource) -> OtherEvaluation | None:
        """Return the metrics of the choice of `eval_images` that the last evaluation did not make.

        Detect only on images that it left out. Return None if all images have boxes.
        """
        if data.val.has_boxes.all() or not data.val.is_labeled:
            return None
        rows = self.result_rows
        if len(data.left_out):
            rows = np.concatenate([rows, self.detect_all(model, data, data.left_out_batches())])
        rows = rows[np.isin(rows[:, 0], data.other_images)]
        return OtherEvaluation(data.other_choice, len(data.other_images), self.compute_metrics(rows, data))

    def detect_all(self, model: nn.Module, data: BoxEvalSource, batches: Iterator[Any]) -> NDArray[np.float64]:
        """Return the detections (D, 7) in the batches of all ranks."""
        device = self.ranks.device
        float64_device = device if supports_float64(device) else torch.device("cpu")
        chunks = [torch.zeros(0, len(RESULT_COLUMNS), dtype=torch.float64, device=float64_device)]
        for batch in prefetch(batches, device):
            detections = to_device(self.predict(model, batch), float64_device)
            image_indices, scales_wh = to_device((batch.image_indices, self.scales_wh(batch)), float64_device)
            chunks.append(to_result_rows(detections, image_indices, scales_wh))
        rows: NDArray[np.float64] = self.ranks.all_gather_rows(torch.cat(chunks)).cpu().numpy()
        return rows

    def compute_metrics(self, rows: NDArray[np.float64], data: BoxEvalSource) -> dict[str, float]:
        """Return COCO's metrics of detections (D, 7), the same on every rank: none without annotations."""
        metrics: dict[str, float] | None = self.ranks.broadcast(data.metric(rows) if data.metric else None)
        return metrics or {}

    def coco_results(self) -> dict[str, list[dict[str, object]]]:
        """Return the detections of the last evaluation in COCO's result format, by file name."""
        return {"detections.json": to_results(self.result_rows, self.val)}

    def verify_official(self) -> dict[str, float]:
        """Recompute the metrics of the last evaluation with the official library, and set `per_class_ap`."""
        official = CocoBoxMetric(self.val)
        metrics = official(self.result_rows)
        self.per_class_ap = official.per_class_ap()
        return metrics


def to_result_rows(detections: Detections, image_indices: Tensor, scales_wh: Tensor) -> Tensor:
    """Convert detections to rows (D, 7) float64 of `coco_metric.RESULT_COLUMNS`, in pixels of the original images.

    image_indices: (B,) in the split. scales_wh: (B, 2) factors of the boxes.
    """
    image = detections.batch_index
    boxes_xyxy = detections.boxes_xyxy.double() * scales_wh[image].repeat(1, 2)
    return torch.cat(
        [
            image_indices[image, None],
            boxes_xyxy[:, :2],
            boxes_xyxy[:, 2:] - boxes_xyxy[:, :2],
            detections.scores[:, None],
            detections.labels[:, None],
        ],
        dim=1,
    )
