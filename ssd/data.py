"""From a COCO split to batches: which image comes when, and what a worker makes of it.

B images, G ground-truth boxes of the fullest image of the batch.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from detection.config.settings import InputError
from detection.data import coco, device_cache, image_io, loader
from detection.data.batch import Share
from detection.data.coco import Split
from detection.data.image_pipeline import Part, Pixels
from detection.data.loader import EpochSampler, Key, load, make_loader, pad
from detection.evaluation.coco_metric import BoxMetric
from detection.runtime.distributed import Ranks
from ssd import augment
from ssd.anchors import IMAGE_SIZE_PX
from ssd.config import Config

SIZE_HW = (IMAGE_SIZE_PX, IMAGE_SIZE_PX)
FLIP_DIRECTIONS = {"none": 0, "horizontal": 1, "horizontal+vertical": 2}


class Batch(NamedTuple):
    """One rank's share of a global batch of training images.

    images: (B, 3, 300, 300) uint8, cropped and resized, or what the device makes them of. boxes_xyxy: (B, G, 4)
    normalised to the crop. labels: (B, G), 0 is padding. flips: (B, directions in use), jitter: (B, 4) and
    jitter_order: (B, 4) as in `augment.Draw`.
    """

    images: Any
    boxes_xyxy: Tensor
    labels: Tensor
    flips: Tensor
    jitter: Tensor
    jitter_order: Tensor


class EvalBatch(NamedTuple):
    """A batch of whole images to evaluate.

    images: (B, 3, 300, 300) uint8. image_ids: (B,) as in COCO. sizes_wh: (B, 2) pixels of the original.
    """

    images: Tensor
    image_ids: Tensor
    sizes_wh: Tensor


class TrainImages(Dataset[Batch]):
    """Training images as batches: read, decode, crop, resize; or, for a device that does that, as what it needs."""

    def __init__(
        self,
        split: Split,
        *,
        seed: int,
        crop: bool,
        jitter: bool,
        flip: str,
        max_samples: int,
        pixels: Pixels,
    ):
        self.split, self.seed, self.pixels = split, seed, pixels
        self.crop, self.jitter, self.max_samples = crop, jitter, max_samples
        self.flip_directions = FLIP_DIRECTIONS[flip]

    def __getitems__(self, keys: Sequence[Key]) -> Batch | InputError:
        """Make the batch of these (epoch, index); an image that cannot be read is returned as its error.

        A worker's exception would reach the user wrapped in a traceback, so it travels as a value.
        """
        made, draws, boxes, labels = [], [], [], []
        for epoch, index in keys:
            try:
                original = self.pixels.read(index, self.split.image_path(index))
            except InputError as error:
                return error
            draw, image_boxes, image_labels = self.draw(epoch, index, *original.size_hw)
            made.append(self.pixels.make(Part(original, box_px(draw.crop_xyxy, original.size_hw), SIZE_HW)))
            draws.append(draw)
            boxes.append(torch.from_numpy(image_boxes))
            labels.append(torch.from_numpy(image_labels))
        return Batch(
            self.pixels.lay_out(made),
            pad(boxes),
            pad(labels),
            torch.from_numpy(np.stack([draw.flips[: self.flip_directions] for draw in draws])),
            torch.from_numpy(np.stack([draw.jitter for draw in draws])),
            torch.from_numpy(np.stack([draw.jitter_order for draw in draws])),
        )

    def draw(
        self, epoch: int, index: int, height_px: int, width_px: int
    ) -> tuple[augment.Draw, augment.Floats, NDArray[np.int64]]:
        """The augmentation of an image in an epoch, its boxes (G, 4) in the crop, and labels (G,)."""
        size = np.array([width_px, height_px, width_px, height_px], dtype=np.float32)
        boxes = np.divide(self.split.boxes(index), size, dtype=np.float32)
        labels = self.split.image_labels(index)
        rng = np.random.default_rng((self.seed, epoch, int(self.split.image_ids[index])))
        drawn = augment.draw(rng, boxes, self.max_samples)
        chosen = augment.Draw(
            drawn.crop_xyxy if self.crop else augment.WHOLE_IMAGE,
            drawn.flips,
            drawn.jitter if self.jitter else augment.NO_JITTER,
            drawn.jitter_order,
        )
        return chosen, *augment.crop_boxes(chosen.crop_xyxy, boxes, labels)


def box_px(crop_xyxy: augment.Floats, size_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """A normalised crop of an image on whole pixels: left, top, right, bottom; at least one wide and high."""
    height, width = size_hw
    left, right = int(crop_xyxy[0] * width), int(crop_xyxy[2] * width)
    top, bottom = int(crop_xyxy[1] * height), int(crop_xyxy[3] * height)
    return left, top, max(right, left + 1), max(bottom, top + 1)


class EvalImages(Dataset[EvalBatch]):
    """Images to evaluate: read, decode, resize."""

    def __init__(self, split: Split):
        self.split = split

    def __getitems__(self, indices: Sequence[int]) -> EvalBatch | InputError:
        """Make the batch of these indices; an image that cannot be read is returned as its error."""
        pixels, sizes = [], []
        for index in indices:
            try:
                image = image_io.read(self.split.image_path(index))
            except InputError as error:
                return error
            pixels.append(image_io.resize(image, SIZE_HW))
            sizes.append((image.shape[2], image.shape[1]))
        ids = torch.from_numpy(self.split.image_ids[list(indices)])
        return EvalBatch(image_io.lay_out(pixels), ids, torch.tensor(sizes))


class SSDEvalData:
    """The evaluation images of a run, and the metric over them."""

    def __init__(self, config: Config, ranks: Ranks):
        val = coco.read(*coco.files(config, "val"), skip_missing_images=config.skip_missing_images)
        coco.check_classes(config.num_classes, val)
        self.ranks, self.val, self.eval_samples, self.categories = ranks, val, len(val), val.categories
        self.metric = BoxMetric(val.annotation_file, config.coco_eval_backend) if ranks.is_first else None
        mine = range(ranks.rank, len(val), ranks.world_size)
        batches = [list(mine[i : i + config.eval_batch_size]) for i in range(0, len(mine), config.eval_batch_size)]
        self.eval_loader = make_loader(EvalImages(val), batches, num_workers=config.num_workers, device=ranks.device)

    def eval_batches(self) -> Iterator[EvalBatch]:
        """This rank's evaluation images; each image is on one rank; InputError names an unreadable image."""
        return load(self.eval_loader)


class SSDData(SSDEvalData):
    """The training and evaluation images of a run, from the moment its clock has started."""

    def __init__(self, config: Config, ranks: Ranks, seed: int):
        train = coco.read(*coco.files(config, "train"), skip_missing_images=config.skip_missing_images)
        coco.check_classes(config.num_classes, train)
        super().__init__(config, ranks)
        train = train.with_boxes()
        self.train_samples = len(train)
        self.sampler = EpochSampler(len(train), config.batch_size, seed=seed, ranks=ranks, last_batch=config.last_batch)
        self.steps_per_epoch = len(self.sampler)
        pixels, self.device_cache = device_cache.make(config, train, ranks)
        dataset = TrainImages(
            train,
            seed=seed,
            crop=config.crop,
            flip=config.flip,
            jitter=config.jitter,
            max_samples=config.max_samples,
            pixels=pixels,
        )
        self.train_loader = make_loader(dataset, self.sampler, num_workers=config.num_workers, device=ranks.device)

    def shares(self, epoch: int, samples: int = 0) -> Iterator[Share[Batch]]:
        """This rank's shares of the global batches of an epoch (from 1), but for the first `samples` images of it.

        InputError names an unreadable image.
        """
        shares = loader.shares(self.train_loader, self.sampler, epoch, samples)
        return device_cache.shares(shares, self.device_cache)
