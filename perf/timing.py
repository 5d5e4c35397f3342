"""Interleaved timing of variants, so that the drift of a shared machine cancels in their ratio."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from detection.runtime.device import synchronize

# Minimum duration of a sample. Short calls repeat until then, so that clock and scheduler do not matter.
SAMPLE_S = 0.1
MIN_ROUNDS = 3


class Variant(NamedTuple):
    """One implementation of some work: `run` processes `images` images, or whatever is counted."""

    name: str
    run: Callable[[], object]
    images: int = 1


@dataclass(frozen=True)
class Quartiles:
    """Summary of n samples."""

    n: int
    median: float
    min: float
    q1: float
    q3: float
    max: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """Return median, quartiles and range of at least one sample."""
    cuts = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Quartiles(len(values), cuts[1], min(values), cuts[0], cuts[2], max(values))


def interleave(
    variants: Sequence[Variant], device: torch.device, *, rounds: int, limit_s: float = math.inf, warm_up: bool = True
) -> list[list[float]]:
    """Return seconds per image of each variant in each round, in the order A B A B ...

    Ends after `limit_s` once three rounds are complete. warm_up: leave out the first call of each variant. Set it to
    False for calls that take minutes.
    """
    calls = [calls_per_sample(variant, device) if warm_up else 1 for variant in variants]
    samples: list[list[float]] = [[] for _ in variants]
    gc.collect()
    gc.disable()
    try:
        start_s = time.perf_counter()
        for completed in range(1, rounds + 1):
            for variant, count, variant_samples in zip(variants, calls, samples, strict=True):
                variant_samples.append(time_calls(variant, count, device) / variant.images)
            if completed >= MIN_ROUNDS and time.perf_counter() - start_s > limit_s:
                break
    finally:
        gc.enable()
    return samples


def calls_per_sample(variant: Variant, device: torch.device) -> int:
    """Warm up, and return the number of calls that last at least `SAMPLE_S`."""
    first_s = time_calls(variant, 1, device)
    call_s = time_calls(variant, 1, device) if first_s < 10 * SAMPLE_S else first_s
    return max(1, math.ceil(SAMPLE_S / call_s))


def time_calls(variant: Variant, calls: int, device: torch.device) -> float:
    """Return seconds per call, including the device's work."""
    synchronize(device)
    start_s = time.perf_counter()
    for _ in range(calls):
        variant.run()
    synchronize(device)
    return (time.perf_counter() - start_s) / calls
