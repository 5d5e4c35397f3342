"""Prefetching of batches to the device, overlapped with the computation on the previous batch."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

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


def to_device(value: T, device: torch.device) -> T:
    """Copy the tensors of a nested tuple to the device. Other values are unchanged."""
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value.to(device, non_blocking=True)
    elif isinstance(value, tuple):
        parts = [to_device(part, device) for part in value]
        moved = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return moved


def wait_ready(batch: T, ready_event: Any, compute_stream: Any) -> T:
    """Make the compute stream wait for this batch only, and the allocator for the compute stream."""
    compute_stream.wait_event(ready_event)
    record_stream(batch, compute_stream)
    return batch


def record_stream(value: Any, stream: Any) -> None:
    """Record for the allocator that a stream uses the tensors of a nested tuple."""
    if isinstance(value, Tensor):
        value.record_stream(stream)
    elif isinstance(value, tuple):
        for part in value:
            record_stream(part, stream)
