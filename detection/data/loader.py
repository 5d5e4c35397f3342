"""Batch sampler and data workers: the images of a rank in each step, and their batches."""

import multiprocessing.util
import os
import re
import signal
import tempfile
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
from detection.data.batch import RankBatch
from detection.runtime.distributed import DistContext
from detection.runtime.signals import SIGNALS

T = TypeVar("T")

# --autotune measures the best number of workers. torch only counts cores.
warnings.filterwarnings("ignore", message="This DataLoader will create")

# (epoch, index in the split). The key carries the epoch, because persistent workers do not see it otherwise.
SampleKey = tuple[int, int]
LastBatch = Literal["partial", "pad", "carry-over"]

LOST_WORKER = re.compile(r"DataLoader worker \(pid")

MAX_SOCKET_DIR = 70  # bytes; multiprocessing appends 32 to it, and a socket's path has at most 107


class DataWorkerDied(RuntimeError):
    """Death of a data worker of this rank."""


class EpochBatchSampler(Sampler[list[SampleKey]]):
    """Sampler of the images of a rank in each step of an epoch.

    An epoch is one permutation of the images, a function of (seed, epoch) only. A global batch is the next slice of
    it, split evenly over the ranks, so the number of ranks does not change what is trained. Set `epoch` and
    `skip_images`, the number of its images that are already trained, before each epoch.

    last_batch: how to build the last global batch of an epoch.
    "partial": the remaining images, split as evenly as possible. A rank without an image gets one image again, with
    weight 0 in the loss, but it still enters the batch-norm statistics.
    "pad": completed with the first images of the epoch, which are trained twice.
    "carry-over": completed with the first images of the next epoch, which then skips them. Each image is still trained
    once per epoch.

    groups: (num_images,) group of each image. If given, global batches contain a single group, as far as its images
    fill them. The remaining images come at the end of the epoch.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        seed: int,
        ranks: DistContext,
        last_batch: LastBatch = "partial",
        groups: NDArray[np.int64] | None = None,
    ):
        self.num_images, self.batch_size, self.seed, self.ranks = num_images, batch_size, seed, ranks
        self.last_batch, self.groups = last_batch, groups
        self.global_batch_size = batch_size * ranks.world_size
        self.epoch, self.skip_images = 1, 0

    def __len__(self) -> int:
        """Return the maximum number of steps of an epoch."""
        return -(-self.num_images // self.global_batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Yield the keys of this rank's images for each remaining step of the current epoch."""
        next_epoch = self.epoch + 1 if self.last_batch == "carry-over" else self.epoch
        keys = [(self.epoch, int(index)) for index in self.permutation(self.epoch)]
        keys += [(next_epoch, int(index)) for index in self.permutation(next_epoch)[: self.global_batch_size]]
        for start, stop, _ in self.rank_slices():
            yield keys[start:stop] if stop > start else keys[:1]

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """Return the order of all images in an epoch."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.num_images)
        if self.groups is None:
            return order
        start = self.images_carried_over(epoch)
        return np.concatenate([order[:start], self.group_by_aspect(order[start:], self.groups)])

    def group_by_aspect(self, order: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """Reorder images (N,) into full global batches of one group, then the rest.

        Batches are sorted by the position of their last image in `order`.
        """
        groups, size = groups[order], self.global_batch_size
        positions = [np.flatnonzero(groups == group) for group in np.unique(groups)]
        full = np.concatenate([p[: len(p) // size * size].reshape(-1, size) for p in positions])
        rest = np.sort(np.concatenate([p[len(p) // size * size :] for p in positions]))
        return order[np.concatenate([full[full[:, -1].argsort()].ravel(), rest])]

    def rank_slices(self) -> Iterator[tuple[int, int, int]]:
        """Yield start and stop of this rank's part of each global batch, and the size of that global batch."""
        rank, world_size = self.ranks.rank, self.ranks.world_size
        for first in range(
            self.images_carried_over(self.epoch) + self.skip_images, self.num_images, self.global_batch_size
        ):
            size = self.global_batch_size
            if self.last_batch == "partial":
                size = min(size, self.num_images - first)
            yield first + size * rank // world_size, first + size * (rank + 1) // world_size, size

    def images_carried_over(self, epoch: int) -> int:
        """Return how many images of an epoch the last batch of the previous epoch contains."""
        return -(epoch - 1) * self.num_images % self.global_batch_size if self.last_batch == "carry-over" else 0


def make_loader(
    dataset: Dataset[Any], batches: Iterable[list[Any]], *, num_workers: int, device: torch.device
) -> DataLoader[Any]:
    """Return a loader whose workers persist for the run. A dataset item is a whole batch."""
    if num_workers:
        make_socket_dir()
    return DataLoader(
        dataset,
        batch_sampler=batches,  # any iterable of lists works
        collate_fn=identity_collate,
        num_workers=num_workers,
        worker_init_fn=ignore_external_signals,
        persistent_workers=num_workers > 0,
        multiprocessing_context="fork" if num_workers else None,  # shares memory instead of copying it
        pin_memory=device.type != "cpu",
    )


def make_socket_dir() -> None:
    """Create multiprocessing's folder of sockets, through which workers pass batches, where its path is short.

    A socket's path has at most 107 bytes. With a longer one, a worker would report it alone, and the run would hang.
    """
    default = tempfile.gettempdir()
    folders = [default] if len(os.fsencode(default)) <= MAX_SOCKET_DIR else ["/tmp", "/var/tmp", "/dev/shm"]
    for tempfile.tempdir in folders:
        try:
            multiprocessing.util.get_temp_dir()  # the first call creates it
            return
        except OSError as error:
            problem = error
        finally:
            tempfile.tempdir = default
    raise InputError(
        f"TMPDIR={default}: too long for sockets, and {folders[-1]} cannot be written ({problem.strerror}). Set a "
        "shorter TMPDIR, or pass --num-workers 0."
    )


def identity_collate(batch: T) -> T:
    """Return the batch: the dataset already collated it."""
    return batch


def ignore_external_signals(_: int) -> None:
    """Ignore signals in a data worker unless its own rank sent them.

    A scheduler may signal every process of a job, but the rank needs batches until it has saved its checkpoint.
    `iter_batches` already blocks the signals in every thread.
    """

    def wait() -> None:
        while signal.sigwaitinfo(SIGNALS).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, name="signals", daemon=True).start()


def pad(rows: Sequence[Tensor]) -> Tensor:
    """Stack (G_i, ...) to (B, G, ...), padded with zeros. G is at least 2, because code recompiles for a size of 1."""
    max_length = max(2, *(len(values) for values in rows))
    padded = rows[0].new_zeros(len(rows), max_length, *rows[0].shape[1:])
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded


def iter_batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the batches of a loader. Raise an InputError that a worker returned instead of a batch."""
    # Workers, and the threads that torch starts in them before worker_init_fn, inherit the blocked signals.
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)
    for batch in batches:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def train_batches(
    loader: DataLoader[Any], sampler: EpochBatchSampler, epoch: int, skip_images: int
) -> Iterator[RankBatch[Any]]:
    """Yield this rank's batches of an epoch (from 1), without the first `skip_images` images of the epoch.

    Raises InputError with the path of an unreadable image.
    """
    sampler.epoch, sampler.skip_images = epoch, skip_images
    for batch, (start, stop, size) in zip(iter_batches(loader), sampler.rank_slices(), strict=True):
        yield RankBatch(batch, size, sampler.ranks.world_size / size if stop > start else 0.0)


@contextmanager
def translate_worker_errors() -> Iterator[None]:
    """Convert torch's error about a killed worker to DataWorkerDied. torch may raise it at any time.

    An exception in a worker is no such error: torch raises its type with "in DataLoader worker process" in the text.
    """
    try:
        yield
    except RuntimeError as error:
        if not LOST_WORKER.match(str(error)):
            raise
        reason = str(error).splitlines()[0]
        raise DataWorkerDied(
            f"{reason} If out of memory, lower --num-workers or --image-cache-gib. After a bus error, give the "
            "container more shared memory (docker run --shm-size)."
        ) from error
