"""Batches on their way to the device: each is copied, or made there, while the one before it is computed."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from detection.runtime.device import has_streams, module

T = TypeVar("T")


def prefetch(batches: Iterable[T], device: torch.device) -> Iterator[T]:
    """The batches, their tensors on the device: tuples of tensors, of other values, and of such tuples.

    The copies run on a stream of their own, one batch ahead, and so does what the iteration itself asks of the device.
    They overlap with the computation only from pinned memory, and never wait for it. On the CPU the batches are passed
    on as they are, and to a device without streams one after the other.
    """
    if device.type == "cpu":
        yield from batches
        return
    if not has_streams(device):
        yield from (move(batch, device) for batch in batches)
        return
    of_device = module(device)
    stream = of_device.Stream(device)
    source = iter(batches)
    ahead: list[tuple[T, Any]] = []
    more = True
    while more:
        with of_device.stream(stream):
            following = [move(batch, device) for batch in islice(source, 1)]
            ahead += [(batch, stream.record_event()) for batch in following]
        more = bool(following)
        while len(ahead) > more:
            yield arrived(*ahead.pop(0), of_device.current_stream())


def move(value: T, device: torch.device) -> T:
    """A tuple with its tensors on the device, at any depth; what is no tensor stays as it is."""
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value.to(device, non_blocking=True)
    elif isinstance(value, tuple):
        parts = [move(part, device) for part in value]
        moved = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return moved


def arrived(batch: T, made: Any, computing: Any) -> T:
    """Make the computation wait for this batch, not for the next, and the allocator for the computation."""
    computing.wait_event(made)
    keep(batch, computing)
    return batch


def keep(value: Any, stream: Any) -> None:
    """Tell the allocator that a stream uses the tensors of a tuple."""
    if isinstance(value, Tensor):
        value.record_stream(stream)
    elif isinstance(value, tuple):
        for part in value:
            keep(part, stream)
