"""Batches on their way to the device: each is copied while the one before it is computed."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from detection.device import has_streams, module

T = TypeVar("T")


def prefetch(batches: Iterable[T], device: torch.device) -> Iterator[T]:
    """The batches, their tensors on the device: tuples of tensors, of other values, and of such tuples.

    The copies run on a stream of their own, one batch ahead. They overlap with the computation only from
    pinned memory, and never wait for it. On the CPU the batches are passed on as they are, and to a device without
    streams one after the other.
    """
    if device.type == "cpu":
        yield from batches
        return
    if not has_streams(device):
        yield from (move(batch, device) for batch in batches)
        return
    of_device = module(device)
    stream = of_device.Stream(device)
    ahead: list[T] = []
    for batch in batches:
        with of_device.stream(stream):
            ahead.append(move(batch, device))
        if len(ahead) > 1:
            yield arrived(ahead.pop(0), stream, of_device.current_stream())
    for batch in ahead:
        yield arrived(batch, stream, of_device.current_stream())


def move(value: T, device: torch.device) -> T:
    """A tuple with its tensors on the device, at any depth; what is no tensor stays as it is."""
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value.to(device, non_blocking=True)
    elif isinstance(value, tuple):
        parts = [move(part, device) for part in value]
        moved = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return moved


def arrived(batch: T, stream: Any, computing: Any) -> T:
    """Make the computation wait for the copies, and the allocator for the computation, before it reuses memory."""
    computing.wait_stream(stream)
    keep(batch, computing)
    return batch


def keep(value: Any, stream: Any) -> None:
    """Tell the allocator that a stream uses the tensors of a tuple."""
    if isinstance(value, Tensor):
        value.record_stream(stream)
    elif isinstance(value, tuple):
        for part in value:
            keep(part, stream)
