"""Profiles of a call: a trace for chrome://tracing or Perfetto, and the operations that take the most time."""

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import profile

from detection.runtime.device import synchronize

NUM_TOP_OPS = 10


class Operation(NamedTuple):
    """An operation of a trace.

    calls: number of times that it ran. ms: time in the operation, excluding the operations that it calls.
    time_fraction: fraction of the time of all operations.
    """

    name: str
    calls: int
    ms: float
    time_fraction: float


# Newer versions of torch warn without this argument. Older versions do not have it.
KEEP_EVENTS: dict[str, Any] = {"acc_events": True} if "acc_events" in signature(profile).parameters else {}


def trace(run: Callable[[], object], device: torch.device, path: Path) -> list[Operation]:
    """Warm up, write a Chrome trace (.json or .json.gz) of one call, and return its top operations."""
    run()
    synchronize(device)
    with profile(**KEEP_EVENTS) as profiler:
        run()
        synchronize(device)
    profiler.export_chrome_trace(str(path))
    return top_ops(profiler.key_averages(), f"self_{'cpu' if device.type == 'cpu' else 'device'}_time_total")


def top_ops(events: Any, key: str) -> list[Operation]:
    """Return the operations with the longest self time, longest first. key: attribute of that time, in microseconds."""
    rows = sorted(events, key=lambda event: getattr(event, key), reverse=True)
    total_us = sum(getattr(event, key) for event in rows) or 1
    return [
        Operation(event.key, event.count, getattr(event, key) / 1000, getattr(event, key) / total_us)
        for event in rows[:NUM_TOP_OPS]
    ]
