"""Mask R-CNN's evaluation and the part of it that lays masks onto images, each beside torchvision's.

D detections of an image, S side of a mask (28).
"""

from collections.abc import Iterator

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
from perf.maskrcnn.training import VariantPair, slow_rounds
from perf.photos import synthesize_gt
from perf.ssd.predictions import make_rows
from perf.timing import Variant

DETECTIONS_PER_IMAGE = 100
PASTED_IMAGES = 4


def time_paste(bench: BenchContext) -> Iterator[Result]:
    """Mask R-CNN's masks onto their images as run lengths, 100 an image, beside torchvision's and pycocotools'."""
    ours, plain = paste_variants(make_scenes(gt_with_masks(bench, PASTED_IMAGES), bench.seed), bench.device)
    yield from bench.compare("maskrcnn_paste", ours, *bench.baselines(plain))


def paste_variants(scenes: list[Scene], device: torch.device) -> VariantPair:
    """Masks of made-up detections to run lengths; each gives those of every image."""

    def ours() -> list[list[CocoRle]]:
        return [masks.paste_masks(scene.masks, scene.boxes_xyxy, scene.size_hw) for scene in scenes]

    def torchvision() -> list[list[CocoRle]]:
        return [baseline.paste_scene(scene, device) for scene in scenes]

    return VariantPair(
        Variant(f"one thread, {DETECTIONS_PER_IMAGE} an image", ours, len(scenes)),
        (Variant("torchvision's, whole images", torchvision, len(scenes)),),
    )


def time_evaluation(bench: BenchContext) -> Iterator[Result]:
    """Mask R-CNN's evaluation from made-up detections, 100 an image, to COCO's figures, beside torchvision's."""
    ours, plain = evaluation_variants(bench)
    yield from bench.compare(
        "maskrcnn_evaluation",
        ours,
        *bench.baselines(plain),
        requirement="maskrcnn evaluation",
        rounds=slow_rounds(bench),
        warm=False,
    )


def evaluation_variants(bench: BenchContext) -> VariantPair:
    """Detections to the figures of boxes and masks, which each gives; network and files take no part."""
    config = training.configured(bench, "--no-legacy-boxes")  # as torchvision writes them
    truth = gt_with_masks(bench, bench.size.maskrcnn_eval_images)
    scenes = make_scenes(truth, bench.seed)
    official = CocoMaskMetric(truth.annotation_file)
    data = SyntheticDetectionData(truth, scenes, config, bench.device)
    evaluation = MaskRCNNEvaluator(config, bench.ranks, data.answer)
    no_network = nn.Identity()
    what = f"{len(scenes)} images × {DETECTIONS_PER_IMAGE}"
    return VariantPair(
        Variant(f"{max(1, config.num_workers)} threads, {what}", lambda: evaluation(no_network, data), len(scenes)),
        (
            Variant(
                f"torchvision's paste, pycocotools, {what}",
                lambda: baseline.evaluate(scenes, official, bench.device),
                len(scenes),
            ),
        ),
    )


class SyntheticDetectionData(MaskRCNNEvalSource):
    """Evaluation data whose images nobody looks at, and the answers to them."""

    def __init__(self, truth: Split, scenes: list[Scene], config: Config, device: torch.device):
        self.val, self.eval_samples, self.categories = truth, len(truth), truth.categories
        self.metric = CocoMaskMetric(truth.annotation_file, config.coco_eval_backend)
        label_of = {category.id: label for label, category in enumerate(truth.categories, 1)}
        self.batches: list[EvalBatch] = []
        self.answers: dict[int, Detections] = {}
        for start in range(0, len(scenes), config.eval_batch_size):
            together = scenes[start : start + config.eval_batch_size]
            sizes_hw = torch.tensor([scene.size_hw for scene in together])
            ids = torch.tensor([scene.image_id for scene in together])
            self.batches.append(EvalBatch(torch.zeros(len(ids), 3, 1, 1, dtype=torch.uint8), sizes_hw, ids, sizes_hw))
            labels = [[label_of[number] for number in scene.category_ids.tolist()] for scene in together]
            boxes, scores, seen = (
                torch.from_numpy(np.stack(parts))
                for parts in zip(*((s.boxes_xyxy, s.scores, s.masks) for s in together), strict=True)
            )
            self.answers[together[0].image_id] = to_device(
                Detections(boxes, scores, torch.tensor(labels), seen), device
            )

    def eval_batches(self) -> Iterator[EvalBatch]:
        """All of them."""
        return iter(self.batches)

    def answer(self, model: nn.Module, batch: EvalBatch) -> Detections:
        """What was made up for a batch, whatever the model."""
        return self.answers[int(batch.image_ids[0])]


def make_scenes(truth: Split, seed: int) -> list[Scene]:
    """Detections of each image, a third around objects of the truth, with masks of blots that have lobes."""
    rng = np.random.default_rng(seed)
    rows = make_rows(truth, DETECTIONS_PER_IMAGE, seed).reshape(len(truth), DETECTIONS_PER_IMAGE, -1)
    scenes = []
    for image_id, (height, width), of_image in zip(truth.image_ids, truth.sizes_hw.tolist(), rows, strict=True):
        low = of_image[:, 1:3].clip(0, (width - 2, height - 2))
        high = np.minimum((of_image[:, 1:3] + of_image[:, 3:5]).clip(low + 1), (width, height))
        scenes.append(
            Scene(
                image_id=int(image_id),
                size_hw=(height, width),
                boxes_xyxy=np.concatenate([low, high], axis=1).astype(np.float32),
                scores=of_image[:, 5].astype(np.float32),
                category_ids=of_image[:, 6].astype(np.int64),
                masks=blots(DETECTIONS_PER_IMAGE, rng),
            )
        )
    return scenes


def blots(count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Masks (count, S, S) as a network gives them: sure within and without, and in doubt at a rim that has lobes."""
    place = (np.arange(MASK_SIZE) + 0.5) / MASK_SIZE * 2 - 1
    x, y = np.meshgrid(place, place)
    turned, depth = rng.uniform(0, 2 * np.pi, (count, 1, 1)), rng.uniform(0, 0.3, (count, 1, 1))
    rim = 0.95 - depth * (1 + np.sin(rng.integers(2, 7, (count, 1, 1)) * np.arctan2(y, x) + turned))
    logits = 12 * (rim - np.hypot(x, y)) + rng.normal(0, 0.5, (count, MASK_SIZE, MASK_SIZE))
    probabilities: NDArray[np.float32] = (1 / (1 + np.exp(-logits))).astype(np.float32)
    return probabilities


def gt_with_masks(bench: BenchContext, num_images: int) -> Split:
    """Outlines of as many images, without their pictures."""
    return synthesize_gt(bench.scratch / f"outlines_{num_images}", num_images, bench.seed, segmentations=True)
