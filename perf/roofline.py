"""What the machine could do at most: its peak rates, measured, and the work of an image, counted."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from detection.runtime.device import precision
from perf.timing import Side, seconds, threads
from ssd.anchors import IMAGE_SIZE_PX

TRIES = 7


class Work(NamedTuple):
    """What has to be done for one image: floating-point operations (a multiply-add is two), bytes moved."""

    flop: float = 0.0
    bytes: float = 0.0


class Limits(NamedTuple):
    """Peak rates of a machine, the best of a few tries: a square matrix product, and a copy (read and written)."""

    flop_per_s: float
    bytes_per_s: float

    def least_s(self, work: Work) -> float:
        """Seconds that an image takes at least: whichever of the two walls is further."""
        return max(work.flop / self.flop_per_s, work.bytes / self.bytes_per_s)


@cache
def measure(device: torch.device, precision_name: str, num_threads: int, side: int, copy_bytes: int) -> Limits:
    """Measure the limits in a precision, on that many threads of the CPU where that is the device.

    side: of the matrices. copy_bytes: of the copy, well beyond the caches.
    """
    dtype = precision(precision_name, device).dtype or torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    product, copy = Side("product", lambda: a @ b), Side("copy", lambda: target.copy_(source))
    with threads(num_threads):
        product_s, copy_s = (min(seconds(s, 1, device) for _ in range(TRIES)) for s in (product, copy))
    return Limits(2 * side**3 / product_s, 2 * copy_bytes / copy_s)


class ByteCounter(TorchDispatchMode):
    """Adds up the bytes that each operation reads and writes, as if nothing stayed in a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            leaves = tree_leaves((args, kwargs, result))
            self.bytes += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        return result


def count(run: Callable[[], object], images: int) -> Work:
    """The work per image of a call, each operation on its own as eager mode does it."""
    with FlopCounterMode(display=False) as flops, ByteCounter() as traffic:
        run()
    return Work(flops.get_total_flops() / images, traffic.bytes / images)


def count_network(make: Callable[[], nn.Module], dtype: torch.dtype | None, *, backward: bool, batch_size: int) -> Work:
    """The work per image of a network that gives a tuple of tensors; nothing is computed for it."""
    with torch.device("meta"):
        model = make().to(dtype or torch.float32).train(backward)
        images = torch.empty(batch_size, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX, dtype=dtype)

    def run() -> None:
        with torch.set_grad_enabled(backward):
            outputs = model(images)
            if backward:
                sum(output.sum() for output in outputs).backward()

    return count(run, batch_size)


def moved(*tensors: Tensor) -> int:
    """Bytes of tensors: of what goes in and what comes out, the least that must be moved."""
    return sum(tensor.nbytes for tensor in tensors)
