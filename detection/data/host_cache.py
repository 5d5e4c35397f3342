"""Cache of decoded images in host memory, which saves decoding from the second epoch on."""

import mmap
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detection.config.run_config import RunConfig
from detection.data import image_io
from detection.data.image_file import ImageFile
from detection.runtime.distributed import DistContext

GIB = 2**30


class HostImageCache:
    """Decoded images in memory shared by the data workers of all ranks of a node, stored on first use.

    Each image has a fixed slot, in the order of the split, up to the limit. Images beyond the limit are decoded every
    time. There is no lock, because two processes that fill the same slot write the same bytes. Workers must be forked
    after the cache is created.
    """

    def __init__(self, sizes_hw: NDArray[np.int32], limit_bytes: int, ranks: DistContext):
        """sizes_hw: (N, 2) pixels, from the annotation file."""
        ends = np.cumsum(3 * sizes_hw.astype(np.int64).prod(axis=1))
        self.num_slots = int(np.searchsorted(ends, limit_bytes, side="right"))
        self.sizes_hw = sizes_hw
        self.offsets = np.concatenate([[0], ends[: self.num_slots]])
        self.size_bytes = int(self.offsets[-1])
        memory = allocate_shared(self.num_slots + self.size_bytes, ranks)
        self.is_cached, self.pixels = memory[: self.num_slots], memory[self.num_slots :]

    def read(self, index: int, file: ImageFile) -> Tensor:
        """Return image `index`, (3, H, W) uint8 with strides of (H, W, 3), and decode it on first use.

        Do not modify the result. Raises InputError for a file that cannot be decoded.
        """
        if index >= self.num_slots:
            return image_io.read(*file)
        slot = self.pixels[self.offsets[index] : self.offsets[index + 1]]
        if not self.is_cached[index]:
            slot[:] = image_io.read(*file).permute(1, 2, 0).reshape(-1).numpy()
            self.is_cached[index] = 1
        height, width = self.sizes_hw[index]
        return torch.from_numpy(slot.reshape(height, width, 3)).permute(2, 0, 1)


def build(config: RunConfig, sizes_hw: NDArray[np.int32], ranks: DistContext) -> HostImageCache | None:
    """Return the cache if the settings request one. sizes_hw: (N, 2) pixels of the training images."""
    if config.image_cache == "none":
        return None
    limit_bytes = int(config.image_cache_gib * GIB) or available_host_memory() // 2
    return HostImageCache(sizes_hw, limit_bytes, ranks)


def allocate_shared(num_bytes: int, ranks: DistContext) -> NDArray[np.uint8]:
    """Return zeros (num_bytes,) shared by all ranks of this node. A page uses memory only once written.

    The memory is anonymous, so it cannot outlive the run, and a container's limit on /dev/shm does not apply.
    """
    descriptor = os.memfd_create("decoded images")
    os.truncate(descriptor, num_bytes + 1)  # an empty file cannot be mapped
    shared_file = ranks.broadcast_in_node(Path("/proc", str(os.getpid()), "fd", str(descriptor)))
    with shared_file.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), num_bytes + 1)
    ranks.barrier()
    os.close(descriptor)
    return np.frombuffer(mapped, dtype=np.uint8)[:num_bytes]


def available_host_memory() -> int:
    """Return the bytes that this process may still allocate: of the host or its cgroup, whichever is less."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no cgroup v2, or its limit is "max"
        return free
    return min(free, limit - used)
