"""Datasets and data sources: splits to batches of whole images, which the device resizes.

B images, G ground-truth boxes of the image with the most. H and W: the largest height and width of the batch.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from detection.config.settings import InputError
from detection.data import coco, device_cache, image_io, loader
from detection.data.batch import RankBatch
from detection.data.coco import Split
from detection.data.image_pipeline import CropSpec, ImagePipeline
from detection.data.loader import EpochBatchSampler, SampleKey, make_loader, pad
from detection.evaluation.box_evaluator import BoxEvalSource
from detection.runtime.distributed import DistContext
from retinanet.config import Config
from retinanet.train_images import select_train_images


class Batch(NamedTuple):
    """Training batch of one rank.

    images: (B, 3, H, W) uint8 at their original size, zeros right of and below the image, channels last, or the input
    of the device's image pipeline. sizes_hw: (B, 2) pixels. boxes_xyxy: (B, G, 4) in pixels of the original image.
    labels: (B, G), 0 is padding. flips: (B,) bool, not yet applied to images and boxes.
    """

    images: Any
    sizes_hw: Tensor
    boxes_xyxy: Tensor
    labels: Tensor
    flips: Tensor


class EvalBatch(NamedTuple):
    """Batch of evaluation images.

    images: (B, 3, H, W) and sizes_hw: (B, 2) as in `Batch`. image_indices: (B,) in the split.
    """

    images: Tensor
    sizes_hw: Tensor
    image_indices: Tensor


class RetinaNetTrainDataset(Dataset[Batch]):
    """Dataset of training batches. `pixels` reads the images, or prepares that for the device."""

    def __init__(self, split: Split, *, seed: int, flip: bool, pixels: ImagePipeline):
        self.split, self.seed, self.flip, self.pixels = split, seed, flip, pixels

    def __getitems__(self, keys: Sequence[SampleKey]) -> Batch | InputError:
        """Load the batch of these (epoch, index) keys. Return the error instead if an image cannot be read.

        An exception raised in a worker would reach the user wrapped in a traceback.
        """
        images, sizes, boxes, labels, flips = [], [], [], [], []
        for epoch, index in keys:
            try:
                source = self.pixels.read(index, self.split.image_file(index))
            except InputError as error:
                return error
            height, width = source.size_hw
            images.append(self.pixels.transform(CropSpec(source, (0, 0, width, height), source.size_hw)))
            sizes.append(source.size_hw)
            boxes.append(torch.from_numpy(self.split.boxes(index)))
            labels.append(torch.from_numpy(self.split.image_labels(index)))
            flips.append(self.flip and self.sample_flip(epoch, index))
        return Batch(self.pixels.collate(images), torch.tensor(sizes), pad(boxes), pad(labels), torch.tensor(flips))

    def sample_flip(self, epoch: int, index: int) -> bool:
        """Sample whether to flip an image in an epoch: half of the images."""
        rng = np.random.default_rng((self.seed, epoch, self.split.rng_key(index)))
        return bool(rng.random() < 0.5)


class RetinaNetEvalDataset(Dataset[EvalBatch]):
    """Dataset of evaluation batches: images are read and decoded."""

    def __init__(self, split: Split):
        self.split = split

    def __getitems__(self, indices: Sequence[int]) -> EvalBatch | InputError:
        """Load the batch of these indices. Return the error instead if an image cannot be read."""
        images = []
        for index in indices:
            try:
                images.append(image_io.read(*self.split.image_file(index)))
            except InputError as error:
                return error
        sizes_hw = torch.tensor([image.shape[1:] for image in images])
        return EvalBatch(image_io.pad_to_batch(images), sizes_hw, torch.tensor(indices))


class RetinaNetEvalSource(BoxEvalSource):
    """Evaluation images of a run, and the metric over them."""

    def __init__(self, config: Config, ranks: DistContext, train: Split | None = None):
        val = coco.open_split(config, "val", train=train)
        super().__init__(val, np.arange(len(val)), RetinaNetEvalDataset(val), config, ranks)


class RetinaNetTrainSource(RetinaNetEvalSource):
    """Training and evaluation images of a run, opened after its timer has started."""

    def __init__(self, config: Config, ranks: DistContext, seed: int):
        train = select_train_images(config, coco.open_split(config, "train"))
        super().__init__(config, ranks, train)
        self.categories = train.categories  # those of val may have other ids
        self.train, self.train_samples = train, len(train)
        self.sampler = EpochBatchSampler(
            len(train), config.batch_size, seed=seed, ranks=ranks, last_batch=config.last_batch
        )
        self.steps_per_epoch = len(self.sampler)
        pixels, self.device_cache = device_cache.build(config, train, ranks)
        dataset = RetinaNetTrainDataset(train, seed=seed, flip=config.flip, pixels=pixels)
        self.train_loader = make_loader(dataset, self.sampler, num_workers=config.num_workers, device=ranks.device)

    def train_batches(self, epoch: int, skip_images: int = 0) -> Iterator[RankBatch[Batch]]:
        """Yield this rank's batches of an epoch (from 1), without the epoch's first `skip_images` images.

        InputError names an unreadable image.
        """
        batches = loader.train_batches(self.train_loader, self.sampler, epoch, skip_images)
        return device_cache.materialize_images(batches, self.device_cache)
