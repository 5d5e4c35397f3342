"""Curves that `perf.growth` measures, from annotations to a training step, on data of detection.synthetic.coco_sized.

B images, G ground-truth boxes per image, N images of a data set, A anchors, K classes.
"""

import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detection.data import coco
from detection.data.batch import RankBatch
from detection.data.prefetch import to_device
from detection.engine import train_loop
from detection.engine.initialization import build_state
from detection.evaluation.coco_metric import CocoBoxMetric
from detection.runtime.device import select_device
from detection.runtime.distributed import DistContext
from detection.synthetic import coco_scenes
from perf import footprint
from perf.footprint import Values, cost, memory_mib
from perf.photos import synthesize_gt, synthesize_photos
from perf.ssd.predictions import make_rows
from ssd import augment
from ssd.anchors import NUM_ANCHORS, make_anchors
from ssd.box_coder import encode
from ssd.config import Config
from ssd.data import SSDTrainSource
from ssd.evaluator import SSDEvaluator
from ssd.loss import multibox_loss
from ssd.model import SSD300
from ssd.postprocess import detect
from ssd.train import make_workload

CLASSES = 81  # COCO's categories and the background
BATCH_SIZE = 8
CROPPED_IMAGES = 100
NUM_PHOTOS = 64  # different ones, which data sets repeat
VAL_IMAGES = 50
LOADED_BATCHES = 40
LOADED_BATCH_SIZE = 16


@dataclass(frozen=True)
class Curve:
    """Cost by amount of work. works: amounts to measure. quick: those of --quick.

    measure: function of an amount and a folder for its files. It runs in a separate process.
    """

    name: str
    works: tuple[int, ...]
    quick: tuple[int, ...]
    measure: Callable[[int, Path], Values]


@dataclass(frozen=True)
class Axis:
    """One kind of work, and the curves that depend on it."""

    name: str
    work: str
    curves: tuple[Curve, ...]


def axes() -> tuple[Axis, ...]:
    """Return all axes."""
    images = (100, 300, 1000, 3000, 10_000, 30_000, 100_000)
    few_images = (40,)
    boxes = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500)
    few_boxes = (0, 8)
    detections = (1, 2, 5, 10, 20, 50, 100, 200, 500)
    candidates = (1, 10, 100, 1000, 10_000, 100_000)
    batches = (1, 2, 4, 8, 16, 32) if select_device("auto", 0).type == "cpu" else (1, 2, 4, 8, 16, 32, 64, 128, 256)
    return (
        Axis(
            "images",
            "images",
            (
                Curve("read annotations", (*images, coco_scenes.TRAIN_IMAGES), few_images, read),
                Curve("open for the metric", images, few_images, open_metric),
                Curve("metric, 10 detections an image", images, few_images, eval_images),
            ),
        ),
        Axis(
            "boxes",
            "boxes per image",
            (
                Curve(f"draw {CROPPED_IMAGES} crops", boxes, few_boxes, crop),
                Curve(f"encode {BATCH_SIZE} images", boxes, few_boxes, encode_boxes),
                Curve(f"loss of {BATCH_SIZE} images, with gradients", boxes, few_boxes, loss),
            ),
        ),
        Axis(
            "detections",
            "detections or candidates per image",
            (
                Curve("metric, 40 images, by detections", (), (2,), partial(eval_detections, 40)),
                Curve("metric, 1,000 images, by detections", detections, (), partial(eval_detections, 1000)),
                Curve(f"detect in {BATCH_SIZE} images, by candidates", candidates, (100,), detect_candidates),
            ),
        ),
        Axis(
            "workers",
            "workers",
            (
                Curve("100 images", (), (0, 1), partial(load, 100)),
                Curve("1,000 images", (0, 1, 2, 4), (), partial(load, 1000)),
                Curve(
                    f"{coco_scenes.TRAIN_IMAGES:,} images", (0, 1, 2, 4), (), partial(load, coco_scenes.TRAIN_IMAGES)
                ),
            ),
        ),
        Axis("batch", "images in a batch", (Curve("training step", batches, (1,), step),)),
    )


def read(images: int, folder: Path) -> Values:
    """Measure reading and validating the annotations of N images, with polygons."""
    return cost(partial(coco.read, *coco.standard_paths(make_annotations(folder, images), "train")))


def open_metric(images: int, folder: Path) -> Values:
    """Measure opening the annotations for the metric, which happens once per run."""
    annotation_file, _ = coco.standard_paths(make_annotations(folder, images), "train")
    return cost(partial(CocoBoxMetric, annotation_file, "hotcoco"))


def eval_images(images: int, folder: Path) -> Values:
    """Measure the metric by images."""
    return eval_detections(images, 10, folder)


def eval_detections(images: int, per_image: int, folder: Path) -> Values:
    """Measure the metric over N images, by detections in each."""
    annotation_file, image_folder = coco.standard_paths(make_annotations(folder, images), "train")
    rows = make_rows(coco.read(annotation_file, image_folder), per_image, seed=0)
    return cost(partial(CocoBoxMetric(annotation_file, "hotcoco"), rows))


def crop(boxes: int, folder: Path) -> Values:
    """Measure sampling crops and cropping the boxes of images with G boxes each."""
    rng = np.random.default_rng(0)
    boxes_xyxy = synthetic_boxes(boxes)[0][0, :boxes].cpu().numpy()
    labels = np.ones(boxes, dtype=np.int64)

    def call() -> None:
        for _ in range(CROPPED_IMAGES):
            augment.crop_boxes(augment.sample_augmentation(rng, boxes_xyxy, 1).crop_xyxy, boxes_xyxy, labels)

    return cost(call)


def encode_boxes(boxes: int, folder: Path) -> Values:
    """Measure encoding the ground truth of a batch to targets."""
    warm_up, gt = synthetic_boxes(1), synthetic_boxes(boxes)
    anchors = make_anchors(warm_up[0].device)
    return cost(partial(encode, *gt, anchors), warm_up=partial(encode, *warm_up, anchors))


def loss(boxes: int, folder: Path) -> Values:
    """Measure the loss of a batch and its gradients."""
    boxes_xyxy, labels = synthetic_boxes(boxes)
    targets = encode(boxes_xyxy, labels, make_anchors(labels.device))
    deltas = torch.zeros(BATCH_SIZE, NUM_ANCHORS, 4, device=labels.device, requires_grad=True)
    logits = torch.randn(BATCH_SIZE, NUM_ANCHORS, CLASSES, device=labels.device, requires_grad=True)

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(multibox_loss(deltas, logits, *targets).sum(), (deltas, logits))

    return cost(call)


def synthetic_boxes(boxes: int) -> tuple[Tensor, Tensor]:
    """Return boxes (B, G, 4), normalized, with sizes spread evenly on a logarithmic scale, and labels (B, G), all 1.

    Without boxes there is one row of padding, as in every batch.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH_SIZE, max(boxes, 1), 2)
    size = torch.exp(torch.empty(shape).uniform_(math.log(0.03), math.log(0.9), generator=generator))
    lower = torch.rand(shape, generator=generator) * (1 - size)
    device = select_device("auto", 0)
    labels = torch.full(shape[:2], min(boxes, 1), dtype=torch.int64, device=device)
    return torch.cat([lower, lower + size], dim=-1).to(device), labels


def detect_candidates(candidates: int, folder: Path) -> Values:
    """Measure detection with `candidates` scores above the threshold per image, spread evenly over classes."""
    device = select_device("auto", 0)
    deltas = torch.zeros(BATCH_SIZE, NUM_ANCHORS, 4, device=device)
    logits, warm_up = (synthetic_logits(number).to(device) for number in (candidates, 1))
    anchors = make_anchors(device)
    return cost(partial(detect, deltas, logits, anchors), warm_up=partial(detect, deltas, warm_up, anchors))


def synthetic_logits(candidates: int) -> Tensor:
    """Return logits (B, A, K), equal for all images, with `candidates` scores above 0.05: up to 12 per anchor."""
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_ANCHORS, CLASSES - 1)
    classes = torch.rand(shape, generator=generator).argsort(dim=1)
    anchor = torch.randperm(NUM_ANCHORS, generator=generator)
    count = (candidates // NUM_ANCHORS + (anchor < candidates % NUM_ANCHORS)).unsqueeze(1)
    values = torch.empty(shape).uniform_(0.8, 1, generator=generator) * 0.9 / count
    scores = torch.zeros(shape).scatter_(1, classes, torch.where(torch.arange(CLASSES - 1) < count, values, 1e-6))
    background = 1 - scores.sum(dim=1, keepdim=True)
    return torch.cat([background, scores], dim=1).log().expand(BATCH_SIZE, -1, -1).contiguous()


def load(images: int, workers: int, folder: Path) -> Values:
    """Measure the input pipeline over N images: from JPEG files in the page cache to batches."""
    config = Config(
        data_dir=make_cached_data_dir(folder, images),
        num_workers=workers,
        num_classes=CLASSES,
        batch_size=LOADED_BATCH_SIZE,
    )
    data = SSDTrainSource(config, DistContext(0, 1, select_device("auto", 0)), seed=0)
    rank_batches = data.train_batches(1)
    start_s = time.perf_counter()
    next(rank_batches)
    first_s = time.perf_counter() - start_s
    for _ in islice(rank_batches, 2 * workers):  # prefetched while the first was loading
        pass
    start_s = time.perf_counter()
    num_images = sum(len(rank_batch.batch.images) for rank_batch in islice(rank_batches, LOADED_BATCHES))
    values = {"rate": num_images / (time.perf_counter() - start_s), "first batch": 1000 * first_s}
    pids = [child.pid for child in multiprocessing.active_children() if child.pid]
    private = [memory_mib("smaps_rollup", "Private_Clean", "Private_Dirty", process=pid) for pid in pids]
    if private:
        values["private to a worker"] = statistics.mean(private)
    pss_mib = [memory_mib("smaps_rollup", "Pss", process=pid) for pid in (os.getpid(), *pids)]
    return values | {"all processes": sum(pss_mib)}


def step(batch_size: int, folder: Path) -> Values:
    """Measure a training step on a dummy batch. Memory is that of the first step, with gradients and momentum."""
    config = Config(data_dir=folder, batch_size=batch_size, num_classes=CLASSES)
    ranks = DistContext(0, 1, select_device(config.device, 0))
    torch.manual_seed(0)
    workload = make_workload(config, ranks, 0, SSD300(CLASSES), SSDEvaluator(config, ranks))
    state = build_state(workload, config, ranks)
    rank_batch = to_device(RankBatch(workload.dummy_batch(), batch_size, 1 / batch_size), ranks.device)
    values = cost(partial(train_loop.train_step, state, rank_batch, 1e-3, workload, config, ranks))
    return values | {"rate": 1000 * batch_size / values["time"]}


def make_annotations(folder: Path, images: int) -> Path:
    """Return a folder with the annotations of N images in COCO's layout and empty image files. Create it if missing."""
    data_dir = folder / f"annotations-{images}"
    if not data_dir.exists():
        footprint.run_in_subprocess(synthesize_gt, data_dir, images, 0)
    return data_dir


def make_cached_data_dir(folder: Path, images: int) -> Path:
    """Return a data set of N images that repeats a few photos. Create it if missing."""
    photo_dir, data_dir = folder / "photos", folder / f"photos-{images}"
    if not data_dir.exists():
        footprint.run_in_subprocess(link_data_dir, photo_dir, data_dir, images)
    return data_dir


def link_data_dir(photo_dir: Path, data_dir: Path, images: int) -> None:
    """Draw the photos if missing, and link them into a data set."""
    synthesize_photos(photo_dir, NUM_PHOTOS, seed=0).make_data_dir(data_dir, images, VAL_IMAGES)
