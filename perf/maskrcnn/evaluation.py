"""Mask R-CNN's evaluation and its mask pasting, compared with torchvision's.

D detections of an image, S side of a mask (28).
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from detection.data.coco import Split
from detection.data.prefetch import to_device
from detection.data.rle import CocoRle
from detection.evaluation.coco_metric import CocoMaskMetric
from maskrcnn import masks
from maskrcnn.config import Config
from maskrcnn.data import EvalBatch, MaskRCNNEvalSource
from maskrcnn.evaluator import MaskRCNNEvaluator
from maskrcnn.postprocess import Detections
from maskrcnn.roi_heads import MASK_SIZE
from perf.harness import BenchContext, Result
from perf.maskrcnn import baseline, training
from perf.maskrcnn.baseline import Scene
from perf.maskrcnn.training import slow_rounds
from perf.ssd.predictions import make_rows
from perf.timing import Variant

DETECTIONS_PER_IMAGE = 100
PASTED_IMAGES = 4


def time_paste(context: BenchContext) -> Iterator[Result]:
    """Time Mask R-CNN's mask pasting to RLE, 100 masks per image, against torchvision and pycocotools."""
    scenes = make_scenes(context.gt_split(PASTED_IMAGES, segmentations=True), context.seed)
    yield from context.compare("maskrcnn_paste", *paste_variants(scenes, context.device))


def paste_variants(scenes: list[Scene], device: torch.device) -> list[Variant]:
    """Return mask pasting of scenes. Each variant returns the RLE masks of every image."""

    def run() -> list[list[CocoRle]]:
        return [masks.paste_masks(scene.masks, scene.boxes_xyxy, scene.size_hw) for scene in scenes]

    def run_torchvision() -> list[list[CocoRle]]:
        return [baseline.paste_scene(scene, device) for scene in scenes]

    optimized = Variant(f"one thread, {DETECTIONS_PER_IMAGE} per image", run, len(scenes))
    return [optimized, Variant("torchvision, full images", run_torchvision, len(scenes))]


def time_evaluation(context: BenchContext) -> Iterator[Result]:
    """Time Mask R-CNN's evaluation of synthetic detections, 100 per image, against torchvision and pycocotools."""
    yield from context.compare(
        "maskrcnn_evaluation",
        *evaluation_variants(context),
        requirement="maskrcnn evaluation",
        rounds=slow_rounds(context),
        warm_up=False,
    )


def evaluation_variants(context: BenchContext) -> list[Variant]:
    """Return evaluations without network and files. Each returns the metrics of boxes and masks."""
    config = training.load_config(context, "--no-legacy-boxes")  # as torchvision writes them
    gt = context.gt_split(context.size.maskrcnn_eval_images, segmentations=True)
    scenes = make_scenes(gt, context.seed)
    pycocotools = CocoMaskMetric(gt)
    data = SyntheticDetectionSource(gt, scenes, config, context.device)
    evaluator = MaskRCNNEvaluator(config, context.ranks, data.predict)
    title = f"{len(scenes)} images × {DETECTIONS_PER_IMAGE}"
    run = partial(evaluator, nn.Identity(), data)
    run_baseline = partial(baseline.evaluate, scenes, pycocotools, context.device)
    return [
        Variant(f"{max(1, config.num_workers)} threads, {title}", run, len(scenes)),
        Variant(f"torchvision's paste, pycocotools, {title}", run_baseline, len(scenes)),
    ]


class SyntheticDetectionSource(MaskRCNNEvalSource):
    """Evaluation data with empty images, and synthetic detections for each batch."""

    def __init__(self, gt: Split, scenes: list[Scene], config: Config, device: torch.device):
        self.val, self.eval_samples, self.categories = gt, len(gt), gt.categories
        self.metric = CocoMaskMetric(gt, config.coco_eval_backend)
        self.batches: list[EvalBatch] = []
        self.detections: dict[int, Detections] = {}  # by index of the first image of a batch
        for start in range(0, len(scenes), config.eval_batch_size):
            batch_scenes = scenes[start : start + config.eval_batch_size]
            sizes_hw = torch.tensor([scene.size_hw for scene in batch_scenes])
            indices = torch.tensor([scene.image_index for scene in batch_scenes])
            images = torch.zeros(len(indices), 3, 1, 1, dtype=torch.uint8)
            self.batches.append(EvalBatch(images, sizes_hw, indices, sizes_hw))
            boxes, scores, labels, probabilities = (
                torch.from_numpy(np.stack(arrays))
                for arrays in zip(*((s.boxes_xyxy, s.scores, s.labels, s.masks) for s in batch_scenes), strict=True)
            )
            self.detections[batch_scenes[0].image_index] = to_device(
                Detections(boxes, scores, labels, probabilities), device
            )

    def eval_batches(self) -> Iterator[EvalBatch]:
        """Yield all batches."""
        return iter(self.batches)

    def predict(self, model: nn.Module, batch: EvalBatch) -> Detections:
        """Return the synthetic detections of a batch, whatever the model."""
        return self.detections[int(batch.image_indices[0])]


def make_scenes(gt: Split, seed: int) -> list[Scene]:
    """Return detections of each image, a third of them near ground-truth objects, with blob-shaped masks."""
    rng = np.random.default_rng(seed)
    rows = make_rows(gt, DETECTIONS_PER_IMAGE, seed).reshape(len(gt), DETECTIONS_PER_IMAGE, -1)
    scenes = []
    for index, ((height, width), image_rows) in enumerate(zip(gt.sizes_hw.tolist(), rows, strict=True)):
        low = image_rows[:, 1:3].clip(0, (width - 2, height - 2))
        high = np.minimum((image_rows[:, 1:3] + image_rows[:, 3:5]).clip(low + 1), (width, height))
        scenes.append(
            Scene(
                image_index=index,
                size_hw=(height, width),
                boxes_xyxy=np.concatenate([low, high], axis=1).astype(np.float32),
                scores=image_rows[:, 5].astype(np.float32),
                labels=image_rows[:, 6].astype(np.int64),
                masks=make_blobs(DETECTIONS_PER_IMAGE, rng),
            )
        )
    return scenes


def make_blobs(count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return masks (count, S, S) of lobed blobs, with uncertain probabilities only at the rim, as a network's."""
    coordinates = (np.arange(MASK_SIZE) + 0.5) / MASK_SIZE * 2 - 1
    x, y = np.meshgrid(coordinates, coordinates)
    angle, depth = rng.uniform(0, 2 * np.pi, (count, 1, 1)), rng.uniform(0, 0.3, (count, 1, 1))
    rim = 0.95 - depth * (1 + np.sin(rng.integers(2, 7, (count, 1, 1)) * np.arctan2(y, x) + angle))
    logits = 12 * (rim - np.hypot(x, y)) + rng.normal(0, 0.5, (count, MASK_SIZE, MASK_SIZE))
    probabilities: NDArray[np.float32] = (1 / (1 + np.exp(-logits))).astype(np.float32)
    return probabilities
