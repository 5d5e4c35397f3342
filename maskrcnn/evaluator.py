"""Evaluation: the network over all evaluation images, then COCO's figures for boxes and for masks.

B images, D detections.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from detection.data.prefetch import prefetch
from detection.data.rle import CompressedMask
from detection.evaluation.coco_metric import ROW, MaskMetric, to_mask_results, to_results
from detection.runtime.distributed import Ranks
from maskrcnn.config import Config
from maskrcnn.data import EvalBatch, MaskRCNNEvalData
from maskrcnn.masks import Floats, paste
from maskrcnn.postprocess import Detections

# Images whose masks wait for a thread, at most, for each of them: all of them would take gigabytes.
WAITING = 16


class Found(NamedTuple):
    """Detections in pixels of the original images: rows (D, 7) float64 of `metric.ROW`, and a mask for each."""

    rows: NDArray[np.float64]
    masks: list[CompressedMask]


class Evaluation:
    """Evaluates Mask R-CNN; `found` are the detections of the last time, on the first rank.

    detect: what the model sees in a batch on the device. Masks are laid onto their images by threads, while the device
    goes on with the next images.
    """

    annotation_file: Path

    def __init__(self, config: Config, ranks: Ranks, detect: Callable[[nn.Module, EvalBatch], Detections]):
        self.config, self.ranks, self.detect = config, ranks, detect
        self.found = together([])
        self.by_class: list[dict[str, object]] = []

    def __call__(self, model: nn.Module, data: MaskRCNNEvalData) -> dict[str, float]:
        """COCO's figures over all evaluation images, spread over the ranks; the same on every rank.

        Those of masks have the names of those of boxes, with mask_ before them: AP and mask_AP.
        """
        category_ids = np.array([0, *(category.id for category in data.val.categories)])
        mine = together(list(self.images(model, data, category_ids)))
        self.annotation_file = data.val.annotation_file
        self.found = together(self.ranks.gather(mine))
        figures: dict[str, float] = self.ranks.broadcast(both(data.metric, self.found) if data.metric else None)
        return figures

    def images(self, model: nn.Module, data: MaskRCNNEvalData, category_ids: NDArray[np.int64]) -> Iterator[Found]:
        """The detections of each of this rank's images; category_ids: (K,) of labels."""
        num_threads = max(1, self.config.num_workers)
        waiting: deque[Future[Found]] = deque()
        with ThreadPoolExecutor(num_threads) as threads:
            for batch in prefetch(data.eval_batches(), self.ranks.device):
                boxes_xyxy, scores, labels, masks = self.detect(model, batch)
                numbers = (boxes_xyxy.float(), scores.float(), labels, masks.float())  # NumPy knows no bfloat16
                arrays = [tensor.cpu().numpy() for tensor in (*numbers, *batch[1:])]
                for of_image in zip(*arrays, strict=True):
                    waiting.append(
                        threads.submit(
                            partial(on_original, *of_image, category_ids=category_ids, legacy=self.config.legacy_boxes)
                        )
                    )
                while len(waiting) > WAITING * num_threads:
                    yield waiting.popleft().result()
            for future in waiting:
                yield future.result()

    def results(self) -> dict[str, list[dict[str, object]]]:
        """The detections of the last time in COCO's format, by the names of their files."""
        return {"bbox.json": to_results(self.found.rows), "segm.json": to_mask_results(*self.found)}

    def confirm(self) -> dict[str, float]:
        """The figures of the last time again, by the official library; `by_class` are the boxes' of each category."""
        official = MaskMetric(self.annotation_file)
        figures = both(official, self.found)
        self.by_class = official.by_class()
        return figures


def on_original(
    boxes_xyxy: Floats,
    scores: Floats,
    labels: NDArray[np.int64],
    masks: Floats,
    size_hw: NDArray[np.int64],
    image_id: np.int64,
    original_size_hw: NDArray[np.int64],
    *,
    category_ids: NDArray[np.int64],
    legacy: bool,
) -> Found:
    """The detections of one image, a row of `Detections` and of `EvalBatch`.

    category_ids: (K,) of labels. legacy: boxes include their last pixel, here one of the original image.
    """
    (seen,) = labels.nonzero()
    scale = np.tile(original_size_hw[::-1] / size_hw[::-1], 2)
    boxes = boxes_xyxy[seen] * scale
    rows = np.concatenate(
        [
            np.full((len(seen), 1), float(image_id)),
            boxes[:, :2],
            boxes[:, 2:] - boxes[:, :2] + int(legacy),
            scores[seen, None],
            category_ids[labels[seen], None],
        ],
        axis=1,
    )
    height, width = original_size_hw.tolist()
    return Found(rows, paste(masks[seen], boxes.astype(np.float32), (height, width)))


def together(parts: Sequence[Found]) -> Found:
    """Detections of several images, or ranks, in one."""
    rows = np.concatenate([np.zeros((0, len(ROW))), *(part.rows for part in parts)])
    return Found(rows, [mask for part in parts for mask in part.masks])


def both(metric: MaskMetric, found: Found) -> dict[str, float]:
    """The figures of boxes, and those of masks with mask_ before their names."""
    of_masks = metric.masks(found.rows, found.masks)
    return metric(found.rows) | {f"mask_{name}": figure for name, figure in of_masks.items()}
