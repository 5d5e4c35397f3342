"""Evaluation: the network over all evaluation images, then COCO's figures.

B images, D detections.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from detection.data.prefetch import move, prefetch
from detection.evaluation.coco_metric import ROW, BoxMetric, to_results
from detection.runtime.device import has_float64
from detection.runtime.distributed import Ranks
from ssd import augment
from ssd.anchors import make_anchors
from ssd.config import Config
from ssd.data import EvalBatch, SSDEvalData
from ssd.postprocess import Detections, detect


class Evaluation:
    """Evaluates SSD300; `rows` are the detections of the last time, columns as in `metric.ROW`."""

    annotation_file: Path

    def __init__(self, config: Config, ranks: Ranks):
        self.config, self.ranks = config, ranks
        self.rows: NDArray[np.float64] = np.zeros((0, len(ROW)))
        self.by_class: list[dict[str, object]] = []

    def __call__(self, model: nn.Module, data: SSDEvalData) -> dict[str, float]:
        """COCO's figures over all evaluation images, spread over the ranks; the same on every rank."""
        device = self.ranks.device
        double = device if has_float64(device) else torch.device("cpu")
        category_ids = torch.tensor([0, *(category.id for category in data.val.categories)], device=double)
        found = [torch.zeros(0, len(ROW), dtype=torch.float64, device=double)]
        for batch in prefetch(data.eval_batches(), device):
            of_images = move((batch.image_ids, batch.sizes_wh), double)
            found.append(to_rows(move(self.detect(model, batch), double), *of_images, category_ids))
        self.annotation_file = data.val.annotation_file
        self.rows = self.ranks.gather_rows(torch.cat(found)).cpu().numpy()
        figures: dict[str, float] = self.ranks.broadcast(data.metric(self.rows) if data.metric else None)
        return figures

    def detect(self, model: nn.Module, batch: EvalBatch) -> Detections:
        """What the model sees in a batch on the device."""
        deltas, logits = model(augment.normalise(augment.to_unit(batch.images)))
        return detect(
            deltas,
            logits,
            make_anchors(self.ranks.device),
            score_threshold=self.config.score_threshold,
            nms_threshold=self.config.nms_threshold,
            max_detections=self.config.max_detections,
        )

    def results(self) -> dict[str, list[dict[str, object]]]:
        """The detections of the last time in COCO's format, by the names of their files."""
        return {"detections.json": to_results(self.rows)}

    def confirm(self) -> dict[str, float]:
        """The figures of the last time again, by the official library; `by_class` are those of each category."""
        official = BoxMetric(self.annotation_file)
        figures = official(self.rows)
        self.by_class = official.by_class()
        return figures


def to_rows(detections: Detections, image_ids: Tensor, sizes_wh: Tensor, category_ids: Tensor) -> Tensor:
    """Detections as rows (D, 7) float64 of `metric.ROW`, in pixels of the original images.

    image_ids: (B,) and sizes_wh: (B, 2) as in `EvalBatch`; category_ids: (K,) of labels.
    """
    image = detections.images
    boxes_xyxy = detections.boxes_xyxy.double() * sizes_wh[image].repeat(1, 2)
    return torch.cat(
        [
            image_ids[image, None],
            boxes_xyxy[:, :2],
            boxes_xyxy[:, 2:] - boxes_xyxy[:, :2],
            detections.scores[:, None],
            category_ids[detections.labels, None],
        ],
        dim=1,
    )
