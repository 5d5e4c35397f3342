"""Decoded images kept in memory, so that from the second epoch on nothing is decoded."""

import mmap
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detection.config.run_config import RunConfig
from detection.data import image_io
from detection.runtime.distributed import Ranks

GIB = 2**30


class DecodedCache:
    """Decoded images in memory that is shared by the data workers of all ranks of a node, filled as they decode.

    Each image has a place of its own, after those before it, as long as the limit allows; what lies beyond is
    decoded each time. Two processes that fill the same place write the same bytes, so nothing is locked. Workers
    must be forked after it is made.
    """

    def __init__(self, sizes_hw: NDArray[np.int32], limit_bytes: int, ranks: Ranks):
        """sizes_hw: (N, 2) pixels of all images, as the annotation file says."""
        ends = np.cumsum(3 * sizes_hw.astype(np.int64).prod(axis=1))
        self.num_places = int(np.searchsorted(ends, limit_bytes, side="right"))
        self.sizes_hw = sizes_hw
        self.starts = np.concatenate([[0], ends[: self.num_places]])
        self.size_bytes = int(self.starts[-1])
        memory = shared_memory(self.num_places + self.size_bytes, ranks)
        self.filled, self.pixels = memory[: self.num_places], memory[self.num_places :]

    def read(self, index: int, path: Path) -> Tensor:
        """Image `index`, (3, H, W) uint8 with strides of (H, W, 3), decoded if it is not there; not to be changed.

        Raises InputError for a file that cannot be decoded.
        """
        if index >= self.num_places:
            return image_io.read(path)
        place = self.pixels[self.starts[index] : self.starts[index + 1]]
        if not self.filled[index]:
            image = image_io.read(path)
            if image.shape[1:] != tuple(self.sizes_hw[index]):
                return image  # the annotation file is wrong about it: there is no place for it
            place[:] = image.permute(1, 2, 0).reshape(-1).numpy()
            self.filled[index] = 1
        height, width = self.sizes_hw[index]
        return torch.from_numpy(place.reshape(height, width, 3)).permute(2, 0, 1)


def make(config: RunConfig, sizes_hw: NDArray[np.int32], ranks: Ranks) -> DecodedCache | None:
    """The cache that the settings ask for, if they do, of training images of these sizes (N, 2) in pixels."""
    if config.image_cache == "none":
        return None
    limit_bytes = int(config.image_cache_gib * GIB) or free_memory_bytes() // 2
    return DecodedCache(sizes_hw, limit_bytes, ranks)


def shared_memory(num_bytes: int, ranks: Ranks) -> NDArray[np.uint8]:
    """Zeros (num_bytes,) that all ranks of this node see; nothing is taken of the machine until it is written to.

    The memory has no name that could outlive the run, and a container's limit on /dev/shm does not bind it.
    """
    descriptor = os.memfd_create("decoded images")
    os.truncate(descriptor, num_bytes + 1)  # an empty file cannot be mapped
    first = ranks.from_node(Path("/proc", str(os.getpid()), "fd", str(descriptor)))
    with first.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), num_bytes + 1)
    ranks.barrier()
    os.close(descriptor)
    return np.frombuffer(mapped, dtype=np.uint8)[:num_bytes]


def free_memory_bytes() -> int:
    """Memory that this process may still take: what the machine has free, or its control group if that is less."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # there is no such group, or its limit is "max"
        return free
    return min(free, limit - used)
