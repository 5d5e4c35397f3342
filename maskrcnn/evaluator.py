"""Evaluator: run the network on all evaluation images, then compute COCO's metrics of boxes and masks.

B images, D detections.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from detection.data.coco import Split
from detection.data.eval_source import OtherEvaluation
from detection.data.prefetch import HostCopy, prefetch
from detection.data.rle import CocoRle
from detection.evaluation.coco_metric import RESULT_COLUMNS, CocoMaskMetric, to_mask_results, to_results
from detection.runtime.distributed import DistContext
from maskrcnn.config import Config
from maskrcnn.data import EvalBatch, MaskRCNNEvalSource
from maskrcnn.masks import Floats, paste_masks
from maskrcnn.postprocess import Detections

# Bounds the images whose masks wait to be pasted: those of a whole split would take gigabytes.
MAX_PENDING_PER_THREAD = 16


class CocoDetections(NamedTuple):
    """Detections in pixels of the original images: rows (D, 7) float64 as in `coco_metric`, and their masks."""

    rows: NDArray[np.float64]
    masks: list[CocoRle]

    def select(self, image_indices: NDArray[np.int64]) -> "CocoDetections":
        """Return the detections on these images."""
        selected = np.isin(self.rows[:, 0], image_indices)
        return CocoDetections(self.rows[selected], list(compress(self.masks, selected)))


class MaskRCNNEvaluator:
    """Evaluator of Mask R-CNN; the first rank keeps the detections of the last evaluation.

    predict: returns the detections of a batch on the device. The device computes the next images while detections are
    copied to the host, where threads paste masks onto their images.
    """

    val: Split

    def __init__(self, config: Config, ranks: DistContext, predict: Callable[[nn.Module, EvalBatch], Detections]):
        self.config, self.ranks, self.predict = config, ranks, predict
        self.detections = concat([])
        self.per_class_ap: list[dict[str, object]] = []

    def __call__(self, model: nn.Module, data: MaskRCNNEvalSource) -> dict[str, float]:
        """Evaluate all images, split over the ranks; return COCO's metrics, the same on every rank.

        Mask metrics have the names of the box metrics with the prefix mask_: AP and mask_AP.
        """
        self.val = data.val
        self.detections = self.detect_all(model, data, data.eval_batches())
        return self.compute_metrics(self.detections, data)

    def evaluate_other(self, model: nn.Module, data: MaskRCNNEvalSource) -> OtherEvaluation | None:
        """Return the metrics of the choice of `eval_images` that the last evaluation did not make.

        Detect only on images that it left out. Return None if all images have boxes.
        """
        if data.val.has_boxes.all() or not data.val.is_labeled:
            return None
        parts = [self.detections]
        if len(data.left_out):
            parts.append(self.detect_all(model, data, data.left_out_batches()))
        detections = concat(parts).select(data.other_images)
        return OtherEvaluation(data.other_choice, len(data.other_images), self.compute_metrics(detections, data))

    def detect_all(self, model: nn.Module, data: MaskRCNNEvalSource, batches: Iterator[EvalBatch]) -> CocoDetections:
        """Return the detections in the batches of all ranks on the first rank, and none on the others."""
        rank_detections = concat(list(self.iter_detections(model, batches)))
        return concat(self.ranks.gather_objects(rank_detections))

    def compute_metrics(self, detections: CocoDetections, data: MaskRCNNEvalSource) -> dict[str, float]:
        """Return the metrics of the first rank's detections, the same on every rank: none without annotations."""
        computed = box_and_mask_metrics(data.metric, detections) if data.metric else None
        metrics: dict[str, float] | None = self.ranks.broadcast(computed)
        return metrics or {}

    def iter_detections(self, model: nn.Module, batches: Iterator[EvalBatch]) -> Iterator[CocoDetections]:
        """Yield the detections of each image of this rank."""
        num_threads = max(1, self.config.num_workers)
        pending: deque[Future[CocoDetections]] = deque()
        with ThreadPoolExecutor(num_threads) as threads:
            for arrays in self.iter_predictions(model, batches):
                for row in zip(*arrays, strict=True):
                    convert = partial(to_original_scale, *row, legacy=self.config.legacy_boxes)
                    pending.append(threads.submit(convert))
                while len(pending) > MAX_PENDING_PER_THREAD * num_threads:
                    yield pending.popleft().result()
            for future in pending:
                yield future.result()

    def iter_predictions(self, model: nn.Module, batches: Iterator[EvalBatch]) -> Iterator[list[NDArray[Any]]]:
        """Yield the detections and the sizes of each batch on the host, after those of the next batch are queued."""
        previous: HostCopy[tuple[Tensor, ...]] | None = None
        for batch in prefetch(batches, self.ranks.device):
            boxes_xyxy, scores, labels, masks = self.predict(model, batch)
            # NumPy has no bfloat16.
            results: tuple[Tensor, ...] = (boxes_xyxy.float(), scores.float(), labels, masks.float(), *batch[1:])
            current = HostCopy(results, self.ranks.device)
            if previous:
                yield [tensor.numpy() for tensor in previous.wait()]
            previous = current
        if previous:
            yield [tensor.numpy() for tensor in previous.wait()]

    def coco_results(self) -> dict[str, list[dict[str, object]]]:
        """Return the detections of the last evaluation in COCO's format, by file name."""
        boxes, masks = to_results(self.detections.rows, self.val), to_mask_results(*self.detections, self.val)
        return {"bbox.json": boxes, "segm.json": masks}

    def verify_official(self) -> dict[str, float]:
        """Recompute the metrics of the last evaluation with pycocotools; set `per_class_ap` to those of the boxes."""
        official = CocoMaskMetric(self.val)
        metrics = box_and_mask_metrics(official, self.detections)
        self.per_class_ap = official.per_class_ap()
        return metrics


def to_original_scale(
    boxes_xyxy: Floats,
    scores: Floats,
    labels: NDArray[np.int64],
    masks: Floats,
    size_hw: NDArray[np.int64],
    image_index: np.int64,
    original_size_hw: NDArray[np.int64],
    *,
    legacy: bool,
) -> CocoDetections:
    """Convert the detections of one image, a row of `Detections` and `EvalBatch`, to the original image.

    legacy: boxes include their last pixel, here a pixel of the original image.
    """
    (valid,) = labels.nonzero()
    scale = np.tile(original_size_hw[::-1] / size_hw[::-1], 2)
    boxes = boxes_xyxy[valid] * scale
    rows = np.concatenate(
        [
            np.full((len(valid), 1), float(image_index)),
            boxes[:, :2],
            boxes[:, 2:] - boxes[:, :2] + int(legacy),
            scores[valid, None],
            labels[valid, None],
        ],
        axis=1,
    )
    height, width = original_size_hw.tolist()
    return CocoDetections(rows, paste_masks(masks[valid], boxes.astype(np.float32), (height, width)))


def concat(parts: Sequence[CocoDetections]) -> CocoDetections:
    """Concatenate the detections of several images or ranks."""
    rows = np.concatenate([np.zeros((0, len(RESULT_COLUMNS))), *(part.rows for part in parts)])
    return CocoDetections(rows, [mask for part in parts for mask in part.masks])


def box_and_mask_metrics(metric: CocoMaskMetric, detections: CocoDetections) -> dict[str, float]:
    """Return the metrics of the boxes, and those of the masks with the prefix mask_."""
    mask_metrics = metric.compute_masks(detections.rows, detections.masks)
    return metric(detections.rows) | {f"mask_{name}": value for name, value in mask_metrics.items()}
