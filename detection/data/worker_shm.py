"""Shared memory through which data workers pass their batches."""

import os
from pathlib import Path

from detection.config.settings import InputError

SHM_DIR = Path("/dev/shm")
PREFETCH_FACTOR = 2  # batches per worker, the default of torch's DataLoader


def free_bytes() -> int | None:
    """Return the free shared memory, or None on a system without it."""
    if not SHM_DIR.exists():
        return None
    status = os.statvfs(SHM_DIR)
    return status.f_bavail * status.f_frsize


def needed_bytes(num_workers: int, batch_bytes: int) -> int:
    """Return the maximum that all workers of this node use: their prefetched batches, plus one being read."""
    return num_workers * (PREFETCH_FACTOR + 1) * batch_bytes


def check(num_workers: int, batch_bytes: int) -> None:
    """Raise InputError if shared memory is too small for the workers of this node.

    Otherwise a worker without memory would report it alone, and the run would hang.
    """
    free, needed = free_bytes(), needed_bytes(num_workers, batch_bytes)
    if free is not None and free < needed:
        raise InputError(
            f"{SHM_DIR}: {free / 2**20:.1f} MiB free, but {num_workers} data workers may need "
            f"{needed / 2**20:.0f} MiB. Give the container more (docker run --shm-size or --ipc=host), "
            "or lower --num-workers (0 needs no shared memory)."
        )
