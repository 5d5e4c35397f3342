"""Synthetic outputs of RetinaNet's heads around ground truth, for benchmarks of the loss, detection and evaluation.

B images, G ground-truth boxes of one image, A_l anchors of level l, K classes without a background.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from detection.boxes import pairwise_iou
from detection.data import coco
from detection.nn import box_coder
from retinanet.anchors import make_anchors
from retinanet.config import Config
from retinanet.model import HeadOutputs

BOXES_PER_IMAGE = 8
MAX_DETECTED_IOU = 0.4  # an anchor with less overlap detects nothing


@dataclass(frozen=True)
class SyntheticScores:
    """Parameters of synthetic logits: mean of the background, standard deviation, and mean on an object."""

    background: float
    std: float
    peak: float


TRAINED = SyntheticScores(background=-8.0, std=1.0, peak=2.0)
"""Objects stand out: a few hundred logits per image are above the threshold of 0.05."""
EARLY = SyntheticScores(background=-4.6, std=1.0, peak=-2.0)
"""After a few steps: 5% of all logits are above the threshold, whose mean is that of the initial bias."""


class Scenes(NamedTuple):
    """Ground truth in pixels of the resized images: boxes_xyxy (B, G, 4), and labels (B, G) from 0."""

    boxes_xyxy: Tensor
    labels: Tensor


def make_scenes(config: Config, count: int, seed: int) -> Scenes:
    """Return random ground truth whose boxes have a side between 5% and 60% of the image."""
    rng = np.random.default_rng(seed)
    sides = np.exp(rng.uniform(np.log(0.05), np.log(0.6), (count, BOXES_PER_IMAGE, 2)))
    low = rng.uniform(0, 1, sides.shape) * (1 - sides)
    boxes = config.image_size * np.concatenate([low, low + sides], axis=2)
    labels = rng.integers(0, config.num_outputs, sides.shape[:2])
    return Scenes(torch.from_numpy(boxes.astype(np.float32)), torch.from_numpy(labels))


def predict(scenes: Scenes, config: Config, scores: SyntheticScores, seed: int) -> HeadOutputs:
    """Return outputs in float32 on the CPU, in the layout of the heads: objects on the anchors that overlap them."""
    generator = torch.Generator().manual_seed(seed)
    logits, deltas = [], []
    count = len(scenes.labels)
    for anchors in make_anchors(config.image_size, config.image_size, torch.device("cpu"), config.anchor_sizes):
        level_logits = torch.randn(count, len(anchors), config.num_outputs, generator=generator)
        level_logits = level_logits.mul_(scores.std).add_(scores.background)
        level_deltas = 0.05 * torch.randn(count, len(anchors), 4, generator=generator)
        for image, (boxes, labels) in enumerate(zip(*scenes, strict=True)):
            iou, matched = pairwise_iou(boxes, anchors).max(dim=0)
            (near,) = (iou > MAX_DETECTED_IOU).nonzero(as_tuple=True)
            level_logits[image, near, labels[matched[near]]] += scores.peak - scores.background
            targets = box_coder.encode(boxes[matched[near]], anchors[near], legacy=False)
            level_deltas[image, near] += 0.8 * targets
        logits.append(level_logits)
        deltas.append(level_deltas)
    return HeadOutputs(logits, deltas)


def write_split(folder: Path, scenes: Scenes, config: Config, num_images: int) -> coco.Split:
    """Write ground truth of `num_images` images, which repeat the scenes in turn, with empty files, and read it."""
    side = config.image_size
    image_dir, annotation_file = folder / "images", folder / "annotations.json"
    image_dir.mkdir(parents=True)
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    sides = torch.cat([scenes.boxes_xyxy[..., :2], scenes.boxes_xyxy[..., 2:] - scenes.boxes_xyxy[..., :2]], dim=2)
    for index in range(num_images):
        images.append({"id": index, "file_name": f"{index}.jpg", "height": side, "width": side})
        (image_dir / f"{index}.jpg").touch()
        scene = index % len(scenes.labels)
        for box, label in zip(sides[scene].tolist(), scenes.labels[scene].tolist(), strict=True):
            row = {"id": len(annotations), "image_id": index, "category_id": label, "bbox": box}
            annotations.append(row | {"area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": label, "name": str(label)} for label in range(config.num_outputs)]
    annotation_file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return coco.read(annotation_file, image_dir)
