"""Evaluation images of a COCO split: those that an evaluation detects on, and those that it leaves out."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from detection.config.run_config import RunConfig
from detection.data.coco import Split
from detection.data.loader import iter_batches, make_loader
from detection.runtime.distributed import DistContext


class OtherEvaluation(NamedTuple):
    """Metrics of the model with another choice of --eval-images, and its number of images."""

    eval_images: str
    images: int
    metrics: dict[str, float]


class CocoEvalSource:
    """Evaluation images of a run, split over the ranks. A metric counts the images of the whole split.

    order: (N,) indices of all images of the split, in the order of their batches. dataset: returns the batch of a list
    of indices. The setting `eval_images` determines whether an evaluation detects on the images without boxes.
    """

    def __init__(
        self, val: Split, order: NDArray[np.intp], dataset: Dataset[Any], config: RunConfig, ranks: DistContext
    ):
        self.val, self.ranks, self.categories = val, ranks, val.categories
        self.dataset, self.batch_size, self.num_workers = dataset, config.eval_batch_size, config.num_workers
        detects_on_all = config.eval_images == "all" or not val.is_labeled
        evaluated = val.has_boxes[order] | detects_on_all
        self.eval_samples = int(evaluated.sum())
        self.eval_loader, self.left_out = self.make_loader(order[evaluated]), order[~evaluated]
        self.other_choice = "with-boxes" if detects_on_all else "all"
        """The choice of `eval_images` that the run did not make."""

    @property
    def other_images(self) -> NDArray[np.int64]:
        """Indices (N,) of the images of `other_choice` in the split."""
        return np.flatnonzero(self.val.has_boxes) if self.other_choice == "with-boxes" else np.arange(len(self.val))

    def make_loader(self, indices: NDArray[np.intp]) -> DataLoader[Any]:
        """Return a loader of this rank's batches of images."""
        rank_indices: list[int] = indices[self.ranks.rank :: self.ranks.world_size].tolist()
        starts = range(0, len(rank_indices), self.batch_size)
        batches = [rank_indices[start : start + self.batch_size] for start in starts]
        return make_loader(self.dataset, batches, num_workers=self.num_workers, device=self.ranks.device)

    def eval_batches(self) -> Iterator[Any]:
        """Yield this rank's evaluation batches. Each image is on one rank. InputError names an unreadable image."""
        return iter_batches(self.eval_loader)

    def left_out_batches(self) -> Iterator[Any]:
        """Yield this rank's batches of the images that `eval_batches` leaves out."""
        return iter_batches(self.make_loader(self.left_out))
