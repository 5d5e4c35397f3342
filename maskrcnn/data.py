"""From a COCO split to batches: which image comes when, and what a worker makes of it.

B images, G ground-truth boxes of the fullest image of the batch, E edges of its longest mask. H and W are those of the
highest and the widest image, made multiples of 32.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

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
from detection.evaluation.coco_metric import MaskMetric
from detection.runtime.distributed import Ranks
from maskrcnn import masks
from maskrcnn.config import Config

# The deepest map of the pyramid that is made by convolutions has one place for so many pixels.
STRIDE_PX = 32


class Batch(NamedTuple):
    """One rank's share of a global batch of training images; a mirrored image comes with all of it mirrored.

    images: (B, 3, H, W) uint8, zeros right of the image and below it, channels last, or what the device makes them of.
    sizes_hw: (B, 2) pixels of the resized image within. boxes_xyxy: (B, G, 4), legacy ones up to their last pixel, and
    edges: (B, G, E, 4), as in `masks.edges_of`, in pixels of the resized image. labels: (B, G), 0 is padding. seeds:
    (B,) of 31 bits, of what is drawn at random on the device.
    """

    images: Any
    sizes_hw: Tensor
    boxes_xyxy: Tensor
    labels: Tensor
    edges: Tensor
    seeds: Tensor


class EvalBatch(NamedTuple):
    """A batch of images to evaluate.

    images: (B, 3, H, W) and sizes_hw: (B, 2) as in `Batch`. image_ids: (B,) as in COCO. original_sizes_hw: (B, 2)
    pixels of the image in its file.
    """

    images: Tensor
    sizes_hw: Tensor
    image_ids: Tensor
    original_sizes_hw: Tensor


class TrainImages(Dataset[Batch]):
    """Training images as batches: read, decode, resize, mirror; or, for a device that does that, as what it needs."""

    def __init__(
        self,
        split: Split,
        *,
        seed: int,
        min_size_px: int,
        max_size_px: int,
        flip: bool,
        legacy: bool,
        pixels: Pixels,
    ):
        self.split, self.seed, self.pixels, self.legacy = split, seed, pixels, legacy
        self.min_size_px, self.max_size_px, self.flip = min_size_px, max_size_px, flip

    def __getitems__(self, keys: Sequence[Key]) -> Batch | InputError:
        """Make the batch of these (epoch, index); an image that cannot be read is returned as its error.

        A worker's exception would reach the user wrapped in a traceback, so it travels as a value.
        """
        made, resized, boxes, labels, edges, seeds = [], [], [], [], [], []
        for epoch, index in keys:
            try:
                original = self.pixels.read(index, self.split.image_path(index))
            except InputError as error:
                return error
            height, width = size_hw = resized_hw(original.size_hw, self.min_size_px, self.max_size_px)
            scale = np.array([width / original.size_hw[1], height / original.size_hw[0]] * 2, dtype=np.float32)
            # As the reference does it: the pixel that a legacy box is shorter by is one of the original image.
            image_boxes = (self.split.boxes(index) - np.array([0, 0, self.legacy, self.legacy], np.float32)) * scale
            image_edges = [of_box * scale for of_box in masks.edges_of(self.split, index)]
            mirrored, drawn = self.draw(epoch, index)
            if mirrored:
                image_boxes = mirror(image_boxes, width - int(self.legacy))[:, [2, 1, 0, 3]]
                image_edges = [mirror(of_box, width) for of_box in image_edges]
            whole = (0, 0, original.size_hw[1], original.size_hw[0])
            made.append(self.pixels.make(Part(original, whole, size_hw, mirrored)))
            resized.append(size_hw)
            boxes.append(torch.from_numpy(image_boxes))
            labels.append(torch.from_numpy(self.split.image_labels(index)))
            edges.append(image_edges)
            seeds.append(drawn)
        return Batch(
            self.pixels.lay_out(made, STRIDE_PX),
            torch.tensor(resized),
            pad(boxes),
            pad(labels),
            pad_edges(edges),
            torch.tensor(seeds),
        )

    def draw(self, epoch: int, index: int) -> tuple[bool, int]:
        """Whether an image is mirrored in an epoch, every other one by chance; and a seed of 31 bits for the device."""
        rng = np.random.default_rng((self.seed, epoch, int(self.split.image_ids[index])))
        return self.flip and bool(rng.random() < 0.5), int(rng.integers(2**31))


class EvalImages(Dataset[EvalBatch]):
    """Images to evaluate: read, decode, resize."""

    def __init__(self, split: Split, *, min_size_px: int, max_size_px: int):
        self.split, self.min_size_px, self.max_size_px = split, min_size_px, max_size_px

    def __getitems__(self, indices: Sequence[int]) -> EvalBatch | InputError:
        """Make the batch of these indices; an image that cannot be read is returned as its error."""
        pixels, originals = [], []
        for index in indices:
            try:
                original = image_io.read(self.split.image_path(index))
            except InputError as error:
                return error
            height, width = original.shape[1:]
            pixels.append(image_io.resize(original, resized_hw((height, width), self.min_size_px, self.max_size_px)))
            originals.append((height, width))
        ids = torch.from_numpy(self.split.image_ids[list(indices)])
        return EvalBatch(lay_out(pixels), sizes(pixels), ids, torch.tensor(originals))


def resized_hw(size_hw: Sequence[int], min_size_px: int, max_size_px: int) -> tuple[int, int]:
    """The size of an image whose short side becomes `min_size_px`, or less where its long side would be too long.

    Rounded as by MLPerf's reference (`Resize` of maskrcnn-benchmark): the short side to the nearest, the long one
    down, which may so be one pixel longer or shorter than by torchvision's rule.
    """
    short, long = sorted(size_hw)
    shorter = min_size_px
    if long / short * min_size_px > max_size_px:
        shorter = round(max_size_px * short / long)
    longer = int(shorter * long / short) or max_size_px  # where nothing would be left of the short side
    shorter = max(1, shorter)
    return (shorter, longer) if size_hw[0] == short else (longer, shorter)


def mirror(rows: masks.Floats, width: int) -> masks.Floats:
    """Rows (N, 4) of x, y, x, y with each x as far from the right border as it was from the left."""
    return np.array([width, 0, width, 0], dtype=np.float32) + rows * np.array([-1, 1, -1, 1], dtype=np.float32)


def lay_out(pixels: Sequence[Tensor]) -> Tensor:
    """Images (3, h, w) in the upper left corners of one tensor (B, 3, H, W), channels last, zeros elsewhere."""
    return image_io.lay_out(pixels, STRIDE_PX)


def sizes(pixels: Sequence[Tensor]) -> Tensor:
    """(B, 2) heights and widths of images (3, h, w)."""
    return torch.tensor([image.shape[1:] for image in pixels])


def pad_edges(edges: Sequence[Sequence[masks.Floats]]) -> Tensor:
    """Edges (E_bg, 4) of each box of each image as (B, G, E, 4), with zeros below; G and E are at least 2."""
    most_boxes = max(2, *(len(of_image) for of_image in edges))
    most_edges = max(2, *(len(of_box) for of_image in edges for of_box in of_image))
    padded = np.zeros((len(edges), most_boxes, most_edges, 4), dtype=np.float32)
    for image, of_image in enumerate(edges):
        for box, of_box in enumerate(of_image):
            padded[image, box, : len(of_box)] = of_box
    return torch.from_numpy(padded)


def open_split(config: Config, name: Literal["train", "val"]) -> Split:
    """A split with its masks, checked; raises InputError."""
    files = coco.files(config, name, segmentations=True)
    split = coco.read(*files, skip_missing_images=config.skip_missing_images, segmentations=True)
    coco.check_classes(config.num_classes, split)
    return split


def is_wide(sizes_hw: NDArray[np.int32]) -> NDArray[np.int64]:
    """(N,) 1 for images as wide as high, or wider, and 0 for others: batches of one kind need little padding."""
    return (sizes_hw[:, 1] >= sizes_hw[:, 0]).astype(np.int64)


def by_shape(sizes_hw: NDArray[np.int32], config: Config) -> NDArray[np.int64]:
    """Order (N,) in which images of like shape, once they are resized, come together."""
    resized = [resized_hw(hw, config.min_image_size, config.max_image_size) for hw in sizes_hw.tolist()]
    return np.lexsort(np.array(resized).T)


class MaskRCNNEvalData:
    """The evaluation images of a run, and the metric over them."""

    def __init__(self, config: Config, ranks: Ranks):
        val = open_split(config, "val")
        self.ranks, self.val, self.eval_samples, self.categories = ranks, val, len(val), val.categories
        self.metric = MaskMetric(val.annotation_file, config.coco_eval_backend) if ranks.is_first else None
        mine = by_shape(val.sizes_hw, config)[ranks.rank :: ranks.world_size].tolist()
        batches = [mine[i : i + config.eval_batch_size] for i in range(0, len(mine), config.eval_batch_size)]
        dataset = EvalImages(val, min_size_px=config.min_image_size, max_size_px=config.max_image_size)
        self.eval_loader = make_loader(dataset, batches, num_workers=config.num_workers, device=ranks.device)

    def eval_batches(self) -> Iterator[EvalBatch]:
        """This rank's evaluation images, those of like shape together; InputError names an unreadable image."""
        return load(self.eval_loader)


class MaskRCNNData(MaskRCNNEvalData):
    """The training and evaluation images of a run, from the moment its clock has started."""

    def __init__(self, config: Config, ranks: Ranks, seed: int):
        train = open_split(config, "train").without_crowds().with_boxes()
        super().__init__(config, ranks)
        self.train_samples = len(train)
        self.sampler = EpochSampler(
            len(train),
            config.batch_size,
            seed=seed,
            ranks=ranks,
            last_batch=config.last_batch,
            groups=is_wide(train.sizes_hw) if config.group_by_aspect_ratio else None,
        )
        self.steps_per_epoch = len(self.sampler)
        pixels, self.device_cache = device_cache.make(config, train, ranks)
        dataset = TrainImages(
            train,
            seed=seed,
            min_size_px=config.min_image_size,
            max_size_px=config.max_image_size,
            flip=config.flip,
            legacy=config.legacy_boxes,
            pixels=pixels,
        )
        self.train_loader = make_loader(dataset, self.sampler, num_workers=config.num_workers, device=ranks.device)

    def shares(self, epoch: int, samples: int = 0) -> Iterator[Share[Batch]]:
        """This rank's shares of the global batches of an epoch (from 1), but for the first `samples` images of it.

        InputError names an unreadable image.
        """
        shares = loader.shares(self.train_loader, self.sampler, epoch, samples)
        return device_cache.shares(shares, self.device_cache)
