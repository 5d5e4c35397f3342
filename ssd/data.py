"""From a COCO split to batches: which image comes when, and what a worker makes of it.

B images, G ground-truth boxes of the fullest image of the batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from detection import coco, images
from detection.coco import Split
from detection.config import InputError
from detection.distributed import Ranks
from detection.engine import Share
from detection.metric import BoxMetric
from ssd import augment
from ssd.anchors import IMAGE_SIZE_PX
from ssd.config import Config

T = TypeVar("T")

# (epoch, index in the split): what a batch is asked for by, so that workers need not be told of the epoch.
Key = tuple[int, int]


class Batch(NamedTuple):
    """One rank's share of a global batch of training images.

    images: (B, 3, 300, 300) uint8, cropped and resized. boxes_xyxy: (B, G, 4) normalised to the crop.
    labels: (B, G), 0 is padding. flips: (B, 2), jitter: (B, 4) and jitter_order: (B, 4) as in `augment.Draw`.
    """

    images: Tensor
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
    """Training images as batches: read, decode, crop, resize."""

    def __init__(self, split: Split, *, seed: int, crop: bool, jitter: bool, flip: str, max_samples: int):
        self.split, self.seed = split, seed
        self.crop, self.jitter, self.max_samples = crop, jitter, max_samples
        self.flips = np.array([flip in ("horizontal", "both"), flip == "both"])

    def __getitems__(self, keys: Sequence[Key]) -> Batch | InputError:
        """Make the batch of these (epoch, index); an image that cannot be read is returned as its error.

        A worker's exception would reach the user wrapped in a traceback, so it travels as a value.
        """
        pixels = torch.empty(len(keys), 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX, dtype=torch.uint8).contiguous(
            memory_format=torch.channels_last
        )
        draws, boxes, labels = [], [], []
        for row, (epoch, index) in enumerate(keys):
            try:
                image = images.read(self.split.image_path(index))
            except InputError as error:
                return error
            draw, image_boxes, image_labels = self.draw(epoch, index, image.shape[1], image.shape[2])
            pixels[row] = images.resize(cut(image, draw.crop_xyxy), IMAGE_SIZE_PX)
            draws.append(draw)
            boxes.append(torch.from_numpy(image_boxes))
            labels.append(torch.from_numpy(image_labels))
        return Batch(
            pixels,
            torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True),
            torch.nn.utils.rnn.pad_sequence(labels, batch_first=True),
            torch.from_numpy(np.stack([draw.flips for draw in draws])),
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
            drawn.flips & self.flips,
            drawn.jitter if self.jitter else augment.NO_JITTER,
            drawn.jitter_order,
        )
        return chosen, *augment.crop_boxes(chosen.crop_xyxy, boxes, labels)


def cut(image: Tensor, crop_xyxy: augment.Floats) -> Tensor:
    """The part (3, h, w) of an image (3, H, W) inside a normalised crop, on whole pixels."""
    height, width = image.shape[1:]
    left, right = int(crop_xyxy[0] * width), int(crop_xyxy[2] * width)
    top, bottom = int(crop_xyxy[1] * height), int(crop_xyxy[3] * height)
    return image[:, top : max(bottom, top + 1), left : max(right, left + 1)]


class EvalImages(Dataset[EvalBatch]):
    """Images to evaluate: read, decode, resize."""

    def __init__(self, split: Split):
        self.split = split

    def __getitems__(self, indices: Sequence[int]) -> EvalBatch | InputError:
        """Make the batch of these indices; an image that cannot be read is returned as its error."""
        pixels, sizes = [], []
        for index in indices:
            try:
                image = images.read(self.split.image_path(index))
            except InputError as error:
                return error
            pixels.append(images.resize(image, IMAGE_SIZE_PX))
            sizes.append((image.shape[2], image.shape[1]))
        ids = torch.from_numpy(self.split.image_ids[list(indices)])
        stacked = torch.stack(pixels).contiguous(memory_format=torch.channels_last)
        return EvalBatch(stacked, ids, torch.tensor(sizes))


class EpochSampler(Sampler[list[Key]]):
    """Which images a rank trains on in each step of an epoch.

    The images of an epoch are one permutation, a function of (seed, epoch) alone; a global batch is the next
    stretch of it and each rank takes an equal part, so that the number of ranks does not change what is trained.
    The last global batch is what remains, shared as evenly as it can be; a rank for which nothing is left is
    given one image again, with weight 0 in the loss.
    """

    def __init__(self, num_images: int, batch_size: int, *, seed: int, ranks: Ranks):
        self.num_images, self.batch_size, self.seed, self.ranks = num_images, batch_size, seed, ranks
        self.epoch = 1

    def __len__(self) -> int:
        """Steps of an epoch."""
        return -(-self.num_images // (self.batch_size * self.ranks.world_size))

    def __iter__(self) -> Iterator[list[Key]]:
        """The (epoch, index) of this rank's images in each step of the current epoch."""
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_images)
        for start, stop, _ in self.stretches():
            rows = order[start:stop] if stop > start else order[:1]
            yield [(self.epoch, int(index)) for index in rows]

    def stretches(self) -> Iterator[tuple[int, int, int]]:
        """Start and stop of this rank's part of each global batch, and the size of that global batch."""
        rank, world_size = self.ranks.rank, self.ranks.world_size
        for first in range(0, self.num_images, self.batch_size * world_size):
            size = min(self.batch_size * world_size, self.num_images - first)
            yield first + size * rank // world_size, first + size * (rank + 1) // world_size, size


class SSDData:
    """The training and evaluation images of a run, from the moment its clock has started."""

    def __init__(self, config: Config, ranks: Ranks, seed: int):
        train, val = (
            coco.read(*coco.layout(config.data_dir, split), allow_missing=config.allow_missing)
            for split in ("train", "val")
        )
        train = train.with_boxes()
        self.ranks, self.val = ranks, val
        self.train_samples, self.eval_samples = len(train), len(val)
        self.sampler = EpochSampler(len(train), config.batch_size, seed=seed, ranks=ranks)
        self.steps_per_epoch = len(self.sampler)
        self.metric = BoxMetric(val.annotation_file, config.metric) if ranks.is_first else None
        dataset = TrainImages(
            train,
            seed=seed,
            crop=config.crop,
            flip=config.flip,
            jitter=config.jitter,
            max_samples=config.max_samples,
        )
        self.train_loader = self.make_loader(dataset, self.sampler, config.num_workers)
        mine = range(ranks.rank, len(val), ranks.world_size)
        batches = [list(mine[i : i + config.eval_batch_size]) for i in range(0, len(mine), config.eval_batch_size)]
        self.eval_loader = self.make_loader(EvalImages(val), batches, config.num_workers)

    def make_loader(self, dataset: Dataset[Any], batches: Iterable[list[Any]], num_workers: int) -> DataLoader[Any]:
        """A loader whose workers stay for the whole run and make whole batches."""
        return DataLoader(
            dataset,
            batch_sampler=batches,  # a list of lists will do
            collate_fn=as_it_is,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=self.ranks.device.type != "cpu",
        )

    def shares(self, epoch: int) -> Iterator[Share[Batch]]:
        """This rank's shares of the global batches of an epoch (from 1); InputError names an unreadable image."""
        self.sampler.epoch = epoch
        for batch, (start, stop, size) in zip(load(self.train_loader), self.sampler.stretches(), strict=True):
            yield Share(batch, size, self.ranks.world_size / size if stop > start else 0.0)

    def eval_batches(self) -> Iterator[EvalBatch]:
        """This rank's evaluation images; each image is on one rank; InputError names an unreadable image."""
        return load(self.eval_loader)


def as_it_is(batch: T) -> T:
    """Collate a batch that is one already."""
    return batch


def load(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader; raises the error that a worker handed over in place of one."""
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch
