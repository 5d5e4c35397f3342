"""Where the time of a call goes: a trace for chrome://tracing or perfetto, and the costliest operations."""

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import profile

from detection.runtime.device import synchronize

COSTLIEST = 10


class Operation(NamedTuple):
    """An operation: how often a call runs it, and the milliseconds in it and in nothing that it calls.

    share: of the time of all operations.
    """

    name: str
    calls: int
    ms: float
    share: float


# Newer versions of torch warn where they are not told; older ones cannot be told.
KEEP_EVENTS: dict[str, Any] = {"acc_events": True} if "acc_events" in signature(profile).parameters else {}


def trace(run: Callable[[], object], device: torch.device, path: Path) -> list[Operation]:
    """Warm up, then trace one call: writes a Chrome trace (.json or .json.gz), returns the costliest operations."""
    run()
    synchronize(device)
    with profile(**KEEP_EVENTS) as profiler:
        run()
        synchronize(device)
    profiler.export_chrome_trace(str(path))
    return costliest(profiler.key_averages(), f"self_{'cpu' if device.type == 'cpu' else 'device'}_time_total")


def costliest(events: Any, key: str) -> list[Operation]:
    """The operations with the greatest times of their own, greatest first. key: of the time, in microseconds."""
    rows = sorted(events, key=lambda event: getattr(event, key), reverse=True)
    total_us = sum(getattr(event, key) for event in rows) or 1
    return [
        Operation(event.key, event.count, getattr(event, key) / 1000, getattr(event, key) / total_us)
        for event in rows[:COSTLIEST]
    ]
