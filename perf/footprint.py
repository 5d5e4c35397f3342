"""Cost of a call: its time, and its peak memory above what the process holds, best measured in a separate process.

Memory is resident memory (VmHWM) with a resolution of 1 MiB. On an accelerator it is the memory of its tensors.
"""

import gc
import multiprocessing
import os
import re
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from detection.runtime.device import select_device
from perf.timing import Variant, calls_per_sample, time_calls

PEAK_RESET = Path("/proc/self/clear_refs")

Values = dict[str, float]
"""Measurements of one process, by name. The names are those of `growth.UNITS`."""


def run_in_subprocess(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a new process that shares nothing with this one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def cost(call: Callable[[], object], warm_up: Callable[[], object] | None = None) -> Values:
    """Return time and additional peak memory of a call.

    The memory is that of the first call. A call shorter than a second repeats, since the first one pays for
    initialization, and the time is that of the repetitions.
    """
    device = select_device("auto", 0)
    variant = Variant("", call)
    if warm_up:
        warm_up()
    gc.collect()
    before = reset_peak_rss(device)
    call_s = time_calls(variant, 1, device)
    memory = max(1.0, peak_mib(device) - before)
    if call_s < 1:
        calls = calls_per_sample(variant, device)
        call_s = statistics.median(time_calls(variant, calls, device) for _ in range(3))
    return {"time": 1000 * call_s, "memory": memory}


def reset_peak_rss(device: torch.device) -> float:
    """Reset the peak memory to the memory held now, and return that in MiB."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        return torch.accelerator.memory_allocated() / 2**20
    PEAK_RESET.write_text("5")
    return memory_mib("status", "VmRSS", process=os.getpid())


def peak_mib(device: torch.device) -> float:
    """Return the peak memory since `reset_peak_rss`, in MiB."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated() / 2**20
    return memory_mib("status", "VmHWM", process=os.getpid())


def memory_mib(file: str, *fields: str, process: int) -> float:
    """Return the sum of some fields of a file of a process in /proc, in MiB."""
    text = Path(f"/proc/{process}/{file}").read_text()
    return sum(int(kb) for kb in re.findall(rf"^(?:{'|'.join(fields)}):\s+(\d+) kB", text, re.MULTILINE)) / 1024
