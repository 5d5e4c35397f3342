"""Training and evaluation data: a COCO split to batches of images and boxes.

Data workers read, decode, crop and resize images. The device can take over decoding and resizing (see
detection/data/image_pipeline.py). The rest of the augmentation follows on the device, in train.py.

Shapes: B images, G ground-truth boxes (padded to the largest number in the batch).
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
from detection.data.batch import RankBatch
from detection.data.coco import Split
from detection.data.image_pipeline import CropSpec, ImagePipeline
from detection.data.loader import EpochBatchSampler, SampleKey, make_loader, pad
from detection.evaluation.box_evaluator import BoxEvalSource
from detection.runtime.distributed import DistContext
from ssd.anchors import IMAGE_SIZE_PX
from ssd.augment import AugmentParams, FloatArray, crop_boxes, sample_augmentation
from ssd.config import Config
from ssd.train_images import select_train_images

SIZE_HW = (IMAGE_SIZE_PX, IMAGE_SIZE_PX)


class Batch(NamedTuple):
    """One rank's part of a global training batch.

    images: (B, 3, 300, 300) uint8, cropped and resized, or the device pipeline's input. boxes_xyxy: (B, G, 4)
    normalized to the crop. labels: (B, G), 0 marks padding. augmentation: random parameters for the device.
    """

    images: Any
    boxes_xyxy: Tensor
    labels: Tensor
    augmentation: AugmentParams


class EvalBatch(NamedTuple):
    """Batch of evaluation images, resized without a crop.

    images: (B, 3, 300, 300) uint8. image_indices: (B,) in the split. sizes_wh: (B, 2) pixels of the original images.
    """

    images: Tensor
    image_indices: Tensor
    sizes_wh: Tensor


class SSDTrainDataset(Dataset[Batch]):
    """Dataset of training batches. `pixels` reads the images and transforms them, or prepares that for the device."""

    def __init__(self, split: Split, config: Config, *, seed: int, pixels: ImagePipeline):
        self.split, self.config, self.seed, self.pixels = split, config, seed, pixels

    def __getitems__(self, keys: Sequence[SampleKey]) -> Batch | InputError:
        """Load the batch of these (epoch, index) keys. Return the error instead if an image cannot be read.

        An exception raised in a worker would reach the user wrapped in a traceback.
        """
        images, params, boxes, labels = [], [], [], []
        for epoch, index in keys:
            try:
                source = self.pixels.read(index, self.split.image_file(index))
            except InputError as error:
                return error
            crop_xyxy, image_params, image_boxes, image_labels = self.sample_params(epoch, index, *source.size_hw)
            images.append(self.pixels.transform(CropSpec(source, crop_to_px(crop_xyxy, source.size_hw), SIZE_HW)))
            params.append(image_params)
            boxes.append(torch.from_numpy(image_boxes))
            labels.append(torch.from_numpy(image_labels))
        return Batch(self.pixels.collate(images), pad(boxes), pad(labels), AugmentParams.stack(params))

    def sample_params(
        self, epoch: int, index: int, height_px: int, width_px: int
    ) -> tuple[FloatArray, AugmentParams, FloatArray, NDArray[np.int64]]:
        """Return the crop (4,) and the augmentation of an image in an epoch, and its boxes (G, 4) and labels (G,)."""
        size = np.array([width_px, height_px, width_px, height_px], dtype=np.float32)
        boxes = np.divide(self.split.boxes(index), size, dtype=np.float32)
        rng = np.random.default_rng((self.seed, epoch, self.split.rng_key(index)))
        crop_xyxy, params = sample_augmentation(self.config, rng, boxes)
        return crop_xyxy, params, *crop_boxes(crop_xyxy, boxes, self.split.image_labels(index))


def crop_to_px(crop_xyxy: FloatArray, size_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """Convert a normalized crop to whole pixels: left, top, right, bottom. Each side is at least one pixel."""
    height, width = size_hw
    left, right = int(crop_xyxy[0] * width), int(crop_xyxy[2] * width)
    top, bottom = int(crop_xyxy[1] * height), int(crop_xyxy[3] * height)
    return left, top, max(right, left + 1), max(bottom, top + 1)


class SSDEvalDataset(Dataset[EvalBatch]):
    """Dataset of evaluation batches: images are read, decoded and resized."""

    def __init__(self, split: Split):
        self.split = split

    def __getitems__(self, indices: Sequence[int]) -> EvalBatch | InputError:
        """Load the batch of these indices. Return the error instead if an image cannot be read."""
        images, sizes = [], []
        for index in indices:
            try:
                image = image_io.read(*self.split.image_file(index))
            except InputError as error:
                return error
            images.append(image_io.resize(image, SIZE_HW))
            sizes.append((image.shape[2], image.shape[1]))
        return EvalBatch(image_io.pad_to_batch(images), torch.tensor(indices), torch.tensor(sizes))


class SSDEvalSource(BoxEvalSource):
    """Evaluation images of a run, and the metric over them."""

    def __init__(self, config: Config, ranks: DistContext, train: Split | None = None):
        val = coco.open_split(config, "val", train=train)
        super().__init__(val, np.arange(len(val)), SSDEvalDataset(val), config, ranks)


class SSDTrainSource(SSDEvalSource):
    """Training and evaluation images of a run, opened after its clock has started."""

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
        dataset = SSDTrainDataset(train, config, seed=seed, pixels=pixels)
        self.train_loader = make_loader(dataset, self.sampler, num_workers=config.num_workers, device=ranks.device)

    def train_batches(self, epoch: int, skip_images: int = 0) -> Iterator[RankBatch[Batch]]:
        """Yield this rank's batches of an epoch (from 1), without the epoch's first `skip_images` images.

        InputError names an unreadable image.
        """
        batches = loader.train_batches(self.train_loader, self.sampler, epoch, skip_images)
        return device_cache.materialize_images(batches, self.device_cache)
