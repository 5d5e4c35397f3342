"""Roofline: measured peak rates of the machine, and the counted work of an image."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from detection.runtime.device import select_precision
from detection.runtime.threads import limit_threads
from perf.timing import Variant, time_calls
from ssd.anchors import IMAGE_SIZE_PX

TRIES = 7


class Work(NamedTuple):
    """Work of one image: floating-point operations (a multiply-add is two) and bytes moved."""

    flop: float = 0.0
    bytes: float = 0.0


class Roofline(NamedTuple):
    """Peak rates of a machine, the best of a few tries: a square matrix product, and a copy (read and written)."""

    flop_per_s: float
    bytes_per_s: float

    def min_s(self, work: Work) -> float:
        """Return the minimum seconds per image: the slower of compute and memory traffic."""
        return max(work.flop / self.flop_per_s, work.bytes / self.bytes_per_s)


@cache
def measure_roofline(
    device: torch.device, precision_name: str, num_threads: int, side: int, copy_bytes: int
) -> Roofline:
    """Measure peak rates in a precision. num_threads: of the CPU, if that is the device.

    side: of the matrices. copy_bytes: size of the copy, well beyond the caches.
    """
    dtype = select_precision(precision_name, device).dtype or torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=device)
    destination = torch.ones_like(source)
    product, copy = Variant("product", lambda: a @ b), Variant("copy", lambda: destination.copy_(source))
    with limit_threads(num_threads):
        product_s, copy_s = (min(time_calls(v, 1, device) for _ in range(TRIES)) for v in (product, copy))
    return Roofline(2 * side**3 / product_s, 2 * copy_bytes / copy_s)


class ByteCounter(TorchDispatchMode):
    """Sum of the bytes that each operation reads and writes, as if no cache existed."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            leaves = tree_leaves((args, kwargs, result))
            self.bytes += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        return result


def count_work(run: Callable[[], object], images: int) -> Work:
    """Return the work per image of a call, counting each operation separately as eager mode runs it."""
    with FlopCounterMode(display=False) as flops, ByteCounter() as traffic:
        run()
    return Work(flops.get_total_flops() / images, traffic.bytes / images)


def count_flop(make: Callable[[], nn.Module], dtype: torch.dtype | None, *, backward: bool, batch_size: int) -> Work:
    """Return the work per image of a network that returns a tuple of tensors, without computing anything."""
    with torch.device("meta"):
        model = make().to(dtype or torch.float32).train(backward)
        images = torch.empty(batch_size, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX, dtype=dtype)

    def run() -> None:
        with torch.set_grad_enabled(backward):
            outputs = model(images)
            if backward:
                sum(output.sum() for output in outputs).backward()

    return count_work(run, batch_size)


def bytes_moved(*tensors: Tensor) -> int:
    """Return the bytes of the inputs and outputs of some work: the minimum memory traffic."""
    return sum(tensor.nbytes for tensor in tensors)
