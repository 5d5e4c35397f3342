"""Timing of ways to do the same work: in turns, so that the drift of a shared machine cancels in their ratio."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from detection.runtime.device import synchronize

# A sample of a quick call is as many calls as last this long, so that the clock and the scheduler do not matter.
SAMPLE_S = 0.1
LEAST_ROUNDS = 3


class Side(NamedTuple):
    """One way to do the work: `run` does it for `images` images (or whatever is counted)."""

    variant: str
    run: Callable[[], object]
    images: int = 1


@dataclass(frozen=True)
class Spread:
    """What n samples gave."""

    n: int
    median: float
    min: float
    q1: float
    q3: float
    max: float


def spread(values: Sequence[float]) -> Spread:
    """Median, quartiles and range of one sample or more."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Spread(len(values), quartiles[1], min(values), quartiles[0], quartiles[2], max(values))


def in_turns(
    sides: Sequence[Side], device: torch.device, *, rounds: int, limit_s: float = math.inf, warm: bool = True
) -> list[list[float]]:
    """Seconds per image of each side in each round: A B A B ..., the first call of each left out.

    Ends after `limit_s` if three rounds are done. warm: without, every call counts, for what takes minutes.
    """
    calls = [calls_per_sample(side, device) if warm else 1 for side in sides]
    samples: list[list[float]] = [[] for _ in sides]
    gc.collect()
    gc.disable()
    try:
        start_s = time.perf_counter()
        for done in range(1, rounds + 1):
            for side, count, mine in zip(sides, calls, samples, strict=True):
                mine.append(seconds(side, count, device) / side.images)
            if done >= LEAST_ROUNDS and time.perf_counter() - start_s > limit_s:
                break
    finally:
        gc.enable()
    return samples


def calls_per_sample(side: Side, device: torch.device) -> int:
    """Warm up, and find how many calls last long enough to be timed."""
    first_s = seconds(side, 1, device)
    once_s = seconds(side, 1, device) if first_s < 10 * SAMPLE_S else first_s
    return max(1, math.ceil(SAMPLE_S / once_s))


def seconds(side: Side, calls: int, device: torch.device) -> float:
    """Seconds per call, the device's work included."""
    synchronize(device)
    start_s = time.perf_counter()
    for _ in range(calls):
        side.run()
    synchronize(device)
    return (time.perf_counter() - start_s) / calls


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute on that many threads of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
