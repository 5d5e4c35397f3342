"""The memory through which data workers hand over their batches."""

import os
from pathlib import Path

from detection.config.settings import InputError

FOLDER = Path("/dev/shm")
BATCHES_AHEAD = 2  # of each worker, as torch's DataLoader has it


def free_bytes() -> int | None:
    """What data workers may still take; None where this system has no such memory."""
    if not FOLDER.exists():
        return None
    status = os.statvfs(FOLDER)
    return status.f_bavail * status.f_frsize


def needed_bytes(num_workers: int, batch_bytes: int) -> int:
    """What all workers of this machine take at most: the batches that each has made ahead, and one that is read."""
    return num_workers * (BATCHES_AHEAD + 1) * batch_bytes


def check(num_workers: int, batch_bytes: int) -> None:
    """Raise InputError where all workers of this machine do not find room for their batches.

    A worker that finds none would say so on its own and leave the run waiting.
    """
    free, needed = free_bytes(), needed_bytes(num_workers, batch_bytes)
    if free is not None and free < needed:
        raise InputError(
            f"{FOLDER} has {free / 2**20:.1f} MiB free, and {num_workers} data workers may need "
            f"{needed / 2**20:.0f} MiB. Give the container more (docker run --shm-size or --ipc=host), "
            "or pass fewer --num-workers; 0 needs none."
        )
