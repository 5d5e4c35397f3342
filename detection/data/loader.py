"""From indices to batches: which images a rank trains on in each step, and the workers that make batches of them."""

import os
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from detection.config.settings import InputError
from detection.data.batch import Share
from detection.runtime.distributed import Ranks
from detection.runtime.signals import SIGNALS

T = TypeVar("T")

# How many workers pay is what --autotune measures: torch counts cores alone.
warnings.filterwarnings("ignore", message="This DataLoader will create")

# (epoch, index in the split): what a batch is asked for by, so that workers need not be told of the epoch.
Key = tuple[int, int]
LastBatch = Literal["partial", "pad", "carry-over"]


class WorkerLost(RuntimeError):
    """A data worker of this rank was ended from outside."""


class EpochSampler(Sampler[list[Key]]):
    """Which images a rank trains on in each step of an epoch.

    The images of an epoch are one permutation, a function of (seed, epoch) alone; a global batch is the next
    stretch of it and each rank takes an equal part, so that the number of ranks does not change what is trained.
    `epoch`, and `samples`, how many images of it are trained already, are set before each epoch.

    last_batch: of the last global batch of an epoch. "partial": what remains, shared as evenly as it can be; a rank
    for which nothing is left is given one image again, with weight 0 in the loss, if not in batch norm's statistics.
    "pad": filled up with the epoch's first images, which are trained twice. "carry-over": filled up with the first of
    the next epoch, which begins after them: each image is still trained once per epoch.

    groups: (num_images,) of which kind each image is. Where given, every global batch is of one kind, as far as the
    images of a kind fill whole ones: what remains of them comes at the end of the epoch.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        seed: int,
        ranks: Ranks,
        last_batch: LastBatch = "partial",
        groups: NDArray[np.int64] | None = None,
    ):
        self.num_images, self.batch_size, self.seed, self.ranks = num_images, batch_size, seed, ranks
        self.last_batch, self.groups = last_batch, groups
        self.global_batch_size = batch_size * ranks.world_size
        self.epoch, self.samples = 1, 0

    def __len__(self) -> int:
        """Steps of a whole epoch, as many as an epoch may have."""
        return -(-self.num_images // self.global_batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        """The (epoch, index) of this rank's images in each step that is left of the current epoch."""
        following = self.epoch + 1 if self.last_batch == "carry-over" else self.epoch
        keys = [(self.epoch, int(index)) for index in self.order(self.epoch)]
        keys += [(following, int(index)) for index in self.order(following)[: self.global_batch_size]]
        for start, stop, _ in self.stretches():
            yield keys[start:stop] if stop > start else keys[:1]

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The permutation of all images in an epoch."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.num_images)
        if self.groups is None:
            return order
        begun = self.begun(epoch)
        return np.concatenate([order[:begun], self.grouped(order[begun:], self.groups)])

    def grouped(self, order: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """Images (N,) so that whole global batches of one kind come first, each when the last of its images would."""
        kinds, size = groups[order], self.global_batch_size
        places = [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]
        whole = np.concatenate([place[: len(place) // size * size].reshape(-1, size) for place in places])
        rest = np.sort(np.concatenate([place[len(place) // size * size :] for place in places]))
        return order[np.concatenate([whole[whole[:, -1].argsort()].ravel(), rest])]

    def stretches(self) -> Iterator[tuple[int, int, int]]:
        """Start and stop of this rank's part of each global batch, and the size of that global batch."""
        rank, world_size = self.ranks.rank, self.ranks.world_size
        for first in range(self.begun(self.epoch) + self.samples, self.num_images, self.global_batch_size):
            size = self.global_batch_size
            if self.last_batch == "partial":
                size = min(size, self.num_images - first)
            yield first + size * rank // world_size, first + size * (rank + 1) // world_size, size

    def begun(self, epoch: int) -> int:
        """How many of an epoch's images the last batch of the one before it has trained."""
        return -(epoch - 1) * self.num_images % self.global_batch_size if self.last_batch == "carry-over" else 0


def make_loader(
    dataset: Dataset[Any], batches: Iterable[list[Any]], *, num_workers: int, device: torch.device
) -> DataLoader[Any]:
    """A loader whose workers stay for the whole run and make whole batches."""
    return DataLoader(
        dataset,
        batch_sampler=batches,  # a list of lists will do
        collate_fn=as_it_is,
        num_workers=num_workers,
        worker_init_fn=heed_only_the_rank,
        persistent_workers=num_workers > 0,
        multiprocessing_context="fork" if num_workers else None,  # what is in memory is shared, not copied
        pin_memory=device.type != "cpu",
    )


def as_it_is(batch: T) -> T:
    """Collate a batch that is one already."""
    return batch


def heed_only_the_rank(_: int) -> None:
    """In a worker, leave signals to the rank unless they come from there.

    A scheduler may signal every process of a job, and the rank needs its batches until it has saved.
    The signals are blocked already, in every thread: see `load`.
    """

    def wait() -> None:
        while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, name="signals", daemon=True).start()


def pad(rows: Sequence[Tensor]) -> Tensor:
    """Stack (G_i, ...) to (B, G, ...) with zeros below; G is at least 2: compiled code is made anew for a 1."""
    longest = max(2, *(len(part) for part in rows))
    stacked = rows[0].new_zeros(len(rows), longest, *rows[0].shape[1:])
    for row, part in zip(stacked, rows, strict=True):
        row[: len(part)] = part
    return stacked


def load(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader; raises the InputError that a worker handed over in place of one."""
    # Workers, and the threads that torch starts in them before it asks us, are born with what is blocked here.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for batch in batches:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def shares(loader: DataLoader[Any], sampler: EpochSampler, epoch: int, samples: int) -> Iterator[Share[Any]]:
    """A rank's shares of the global batches of an epoch (from 1), but for the first `samples` images of it.

    InputError names an unreadable image.
    """
    sampler.epoch, sampler.samples = epoch, samples
    for batch, (start, stop, size) in zip(load(loader), sampler.stretches(), strict=True):
        yield Share(batch, size, sampler.ranks.world_size / size if stop > start else 0.0)


@contextmanager
def lost_workers_named() -> Iterator[None]:
    """Raise WorkerLost in place of what torch raises where a worker was killed, which may be at any moment."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        what = str(error).splitlines()[0]
        raise WorkerLost(
            f"{what} Where it was out of memory: fewer --num-workers, a smaller --image-cache-gib; where it was "
            "a bus error: more shared memory (docker run --shm-size)."
        ) from error
