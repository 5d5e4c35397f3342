"""Datasets and data sources: COCO splits to batches.

B images, G ground-truth boxes of the image with the most, V vertices of the longest mask. H and W: the largest height
and width of the batch, rounded up to multiples of 32.
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
from detection.data.eval_source import CocoEvalSource
from detection.data.image_pipeline import CropSpec, ImagePipeline
from detection.data.loader import EpochBatchSampler, SampleKey, make_loader, pad
from detection.evaluation.coco_metric import CocoMaskMetric
from detection.runtime.distributed import DistContext
from maskrcnn import masks
from maskrcnn.config import Config
from maskrcnn.train_images import select_train_images

STRIDE_PX = 32  # of P5, the deepest level that convolutions compute


class Batch(NamedTuple):
    """Training batch of one rank; flips apply to images, boxes and masks alike.

    images: (B, 3, H, W) uint8, zeros right of and below the image, channels last, or the input of the device's image
    pipeline. sizes_hw: (B, 2) pixels of the resized image. boxes_xyxy: (B, G, 4), legacy boxes up to their last pixel,
    and vertices: (B, G, V, 3), as in `masks.mask_vertices`, both in pixels of the resized image. labels: (B, G), 0 is
    padding. seeds: (B,) of 31 bits, for sampling on the device.
    """

    images: Any
    sizes_hw: Tensor
    boxes_xyxy: Tensor
    labels: Tensor
    vertices: Tensor
    seeds: Tensor


class EvalBatch(NamedTuple):
    """Batch of evaluation images.

    images: (B, 3, H, W) and sizes_hw: (B, 2) as in `Batch`. image_indices: (B,) in the split.
    original_sizes_hw: (B, 2) pixels of the original images.
    """

    images: Tensor
    sizes_hw: Tensor
    image_indices: Tensor
    original_sizes_hw: Tensor


class MaskRCNNTrainDataset(Dataset[Batch]):
    """Dataset of training batches. `pixels` reads, resizes and flips the images, or prepares that for the device."""

    def __init__(
        self,
        split: Split,
        *,
        seed: int,
        min_size_px: int,
        max_size_px: int,
        flip: bool,
        legacy: bool,
        pixels: ImagePipeline,
    ):
        self.split, self.seed, self.pixels, self.legacy = split, seed, pixels, legacy
        self.min_size_px, self.max_size_px, self.flip = min_size_px, max_size_px, flip

    def __getitems__(self, keys: Sequence[SampleKey]) -> Batch | InputError:
        """Load the batch of these (epoch, index) keys. Return the error instead if an image cannot be read.

        An exception raised in a worker would reach the user wrapped in a traceback.
        """
        images, sizes, boxes, labels, vertices, seeds = [], [], [], [], [], []
        for epoch, index in keys:
            try:
                source = self.pixels.read(index, self.split.image_file(index))
            except InputError as error:
                return error
            height, width = size_hw = resized_hw(source.size_hw, self.min_size_px, self.max_size_px)
            scale = np.array([width / source.size_hw[1], height / source.size_hw[0]], dtype=np.float32)
            # As in the reference, legacy boxes lose a pixel of the original image, not of the resized one.
            image_boxes = self.split.boxes(index) - np.array([0, 0, self.legacy, self.legacy], np.float32)
            image_boxes *= np.tile(scale, 2)
            image_vertices = masks.mask_vertices(self.split, index)
            for mask in image_vertices:
                mask[:, :2] *= scale
            flipped, seed = self.sample_params(epoch, index)
            if flipped:
                image_boxes[:, [0, 2]] = hflip(image_boxes[:, [2, 0]], width, self.legacy)
                for mask in image_vertices:
                    mask[:, 0] = hflip(mask[:, 0], width, self.legacy)
            whole = (0, 0, source.size_hw[1], source.size_hw[0])
            images.append(self.pixels.transform(CropSpec(source, whole, size_hw, flipped)))
            sizes.append(size_hw)
            boxes.append(torch.from_numpy(image_boxes))
            labels.append(torch.from_numpy(self.split.image_labels(index)))
            vertices.append(image_vertices)
            seeds.append(seed)
        return Batch(
            self.pixels.collate(images, STRIDE_PX),
            torch.tensor(sizes),
            pad(boxes),
            pad(labels),
            pad_vertices(vertices),
            torch.tensor(seeds),
        )

    def sample_params(self, epoch: int, index: int) -> tuple[bool, int]:
        """Sample whether to flip an image in an epoch (half of the images), and a seed of 31 bits for the device."""
        rng = np.random.default_rng((self.seed, epoch, self.split.rng_key(index)))
        return self.flip and bool(rng.random() < 0.5), int(rng.integers(2**31))


class MaskRCNNEvalDataset(Dataset[EvalBatch]):
    """Dataset of evaluation batches: images are read, decoded and resized."""

    def __init__(self, split: Split, *, min_size_px: int, max_size_px: int):
        self.split, self.min_size_px, self.max_size_px = split, min_size_px, max_size_px

    def __getitems__(self, indices: Sequence[int]) -> EvalBatch | InputError:
        """Load the batch of these indices. Return the error instead if an image cannot be read."""
        images, original_sizes = [], []
        for index in indices:
            try:
                image = image_io.read(*self.split.image_file(index))
            except InputError as error:
                return error
            height, width = image.shape[1:]
            images.append(image_io.resize(image, resized_hw((height, width), self.min_size_px, self.max_size_px)))
            original_sizes.append((height, width))
        return EvalBatch(pad_to_batch(images), stack_sizes(images), torch.tensor(indices), torch.tensor(original_sizes))


def resized_hw(size_hw: Sequence[int], min_size_px: int, max_size_px: int) -> tuple[int, int]:
    """Return the size at which the short side is `min_size_px`, or less if the long side would exceed `max_size_px`.

    Rounds as the MLPerf reference (`Resize` of maskrcnn-benchmark): the short side to nearest, the long side down.
    The long side may differ by one pixel from torchvision's.
    """
    short, long = sorted(size_hw)
    shorter = min_size_px
    if long / short * min_size_px > max_size_px:
        shorter = round(max_size_px * short / long)
    longer = int(shorter * long / short) or max_size_px  # if the short side rounds to 0
    shorter = max(1, shorter)
    return (shorter, longer) if size_hw[0] == short else (longer, shorter)


def hflip(x: masks.Floats, width: int, legacy: bool) -> masks.Floats:
    """Flip x coordinates of boxes or polygons in an image.

    legacy: the last pixel is width - 1. The reference flips polygons likewise, which moves them left by a pixel.
    """
    return width - x - np.float32(legacy)


def pad_to_batch(images: Sequence[Tensor]) -> Tensor:
    """Stack images (3, h, w) to (B, 3, H, W), channels last, padded right and below with zeros."""
    return image_io.pad_to_batch(images, STRIDE_PX)


def stack_sizes(images: Sequence[Tensor]) -> Tensor:
    """Return heights and widths (B, 2) of images (3, h, w)."""
    return torch.tensor([image.shape[1:] for image in images])


def pad_vertices(vertices: Sequence[Sequence[masks.Floats]]) -> Tensor:
    """Stack the vertices (v, 3) of each box of each image to (B, G, V, 3), padded with zeros; G, V are at least 2."""
    max_boxes = max(2, *(len(image_vertices) for image_vertices in vertices))
    max_vertices = max((len(mask) for image_vertices in vertices for mask in image_vertices), default=0)
    padded = np.zeros((len(vertices), max_boxes, max(2, max_vertices), 3), dtype=np.float32)
    for image, image_vertices in enumerate(vertices):
        for box, mask in enumerate(image_vertices):
            padded[image, box, : len(mask)] = mask
    return torch.from_numpy(padded)


def aspect_groups(sizes_hw: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return (N,) 1 for portrait and square images, 0 for landscape: batches of one group need little padding."""
    return (sizes_hw[:, 0] >= sizes_hw[:, 1]).astype(np.int64)


def order_by_shape(sizes_hw: NDArray[np.int32], config: Config) -> NDArray[np.int64]:
    """Return an order (N,) that groups images of equal size after the resize."""
    resized = [resized_hw(hw, config.min_image_size, config.max_image_size) for hw in sizes_hw.tolist()]
    return np.lexsort(np.array(resized).T)


class MaskRCNNEvalSource(CocoEvalSource):
    """Evaluation images of a run, ordered by their size, and the metric over them."""

    def __init__(self, config: Config, ranks: DistContext, train: Split | None = None):
        val = coco.open_split(config, "val", segmentations=True, train=train)
        dataset = MaskRCNNEvalDataset(val, min_size_px=config.min_image_size, max_size_px=config.max_image_size)
        super().__init__(val, order_by_shape(val.sizes_hw, config), dataset, config, ranks)
        self.metric = CocoMaskMetric(val, config.coco_eval_backend) if ranks.is_main and val.is_labeled else None


class MaskRCNNTrainSource(MaskRCNNEvalSource):
    """Training and evaluation images of a run, opened after its clock has started."""

    def __init__(self, config: Config, ranks: DistContext, seed: int):
        train = select_train_images(config, coco.open_split(config, "train", segmentations=True))
        super().__init__(config, ranks, train)
        self.categories = train.categories  # those of val may have other ids
        self.train, self.train_samples = train, len(train)
        self.sampler = EpochBatchSampler(
            len(train),
            config.batch_size,
            seed=seed,
            ranks=ranks,
            last_batch=config.last_batch,
            groups=aspect_groups(train.sizes_hw) if config.group_by_aspect_ratio else None,
        )
        self.steps_per_epoch = len(self.sampler)
        pixels, self.device_cache = device_cache.build(config, train, ranks)
        dataset = MaskRCNNTrainDataset(
            train,
            seed=seed,
            min_size_px=config.min_image_size,
            max_size_px=config.max_image_size,
            flip=config.flip,
            legacy=config.legacy_boxes,
            pixels=pixels,
        )
        self.train_loader = make_loader(dataset, self.sampler, num_workers=config.num_workers, device=ranks.device)

    def train_batches(self, epoch: int, skip_images: int = 0) -> Iterator[RankBatch[Batch]]:
        """Yield this rank's batches of an epoch (from 1), without the epoch's first `skip_images` images.

        InputError names an unreadable image.
        """
        batches = loader.train_batches(self.train_loader, self.sampler, epoch, skip_images)
        return device_cache.materialize_images(batches, self.device_cache)
