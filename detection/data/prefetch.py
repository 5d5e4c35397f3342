"""Copies between host and device that overlap with computation: batches to the device, and results from it."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from detection.runtime.device import backend_module, has_streams

T = TypeVar("T")


def prefetch(batches: Iterable[T], device: torch.device) -> Iterator[T]:
    """Yield the batches with their tensors on the device. A batch is a nested tuple of tensors and other values.

    A separate stream runs the copies one batch ahead, and all device work of the iteration. Copies overlap with the
    computation only from pinned memory, and never wait for it. On the CPU the batches are yielded unchanged. A device
    without streams copies synchronously.
    """
    if device.type == "cpu":
        yield from batches
        return
    if not has_streams(device):
        yield from (to_device(batch, device) for batch in batches)
        return
    backend = backend_module(device)
    stream = backend.Stream(device)
    source = iter(batches)
    queue: list[tuple[T, Any]] = []
    has_next = True
    while has_next:
        with backend.stream(stream):
            next_batch = [to_device(batch, device) for batch in islice(source, 1)]
            queue += [(batch, stream.record_event()) for batch in next_batch]
        has_next = bool(next_batch)
        while len(queue) > has_next:
            yield wait_ready(*queue.pop(0), backend.current_stream())


class HostCopy(Generic[T]):
    """Copy of the tensors of nested tuples and lists to the host, while the device works on what is queued after it."""

    def __init__(self, value: T, device: torch.device):
        is_async = device.type != "cpu" and has_streams(device)
        self.value = move(value, torch.device("cpu"), non_blocking=is_async)
        self.event = backend_module(device).current_stream().record_event() if is_async else None

    def wait(self) -> T:
        """Return the copy once it is complete."""
        if self.event is not None:
            self.event.synchronize()
        return self.value


def to_device(value: T, device: torch.device) -> T:
    """Copy the tensors of nested tuples and lists to the device. Other values are unchanged.

    A copy to the CPU is complete on return.
    """
    return move(value, device, non_blocking=device.type != "cpu")


def move(value: T, device: torch.device, *, non_blocking: bool) -> T:
    """Copy the tensors of nested tuples and lists to a device, and return at once if non_blocking and possible."""
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value.to(device, non_blocking=non_blocking)
    elif isinstance(value, tuple | list):
        parts = [move(part, device, non_blocking=non_blocking) for part in value]
        moved = type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return moved


def wait_ready(batch: T, ready_event: Any, compute_stream: Any) -> T:
    """Make the compute stream wait for this batch only, and the allocator for the compute stream."""
    compute_stream.wait_event(ready_event)
    record_stream(batch, compute_stream)
    return batch


def record_stream(value: Any, stream: Any) -> None:
    """Record for the allocator that a stream uses the tensors of nested tuples and lists."""
    if isinstance(value, Tensor):
        value.record_stream(stream)
    elif isinstance(value, tuple | list):
        for part in value:
            record_stream(part, stream)
