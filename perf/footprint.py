"""What a call costs: its time, and its peak of memory above what the process holds, best in a process of its own.

Memory is resident memory (VmHWM), 1 MiB or more, since less cannot be told apart; on an accelerator it is that of the
tensors on it.
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
"""What one process measured: a value for each of some of `growth.UNITS`."""


def run_in_subprocess(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a process that is started for it and shares nothing with this one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def cost(call: Callable[[], object], warm_up: Callable[[], object] | None = None) -> Values:
    """Time of a call, and its peak of memory above what is held before it.

    The memory is that of the first call. Its time counts only where it took a second or more: what takes less is
    called again, since the first call pays for what later ones find ready.
    """
    device = select_device("auto", 0)
    side = Variant("", call)
    if warm_up:
        warm_up()
    gc.collect()
    before = reset_peak_rss(device)
    once_s = time_calls(side, 1, device)
    memory = max(1.0, peak_mib(device) - before)
    if once_s < 1:
        calls = calls_per_sample(side, device)
        once_s = statistics.median(time_calls(side, calls, device) for _ in range(3))
    return {"time": 1000 * once_s, "memory": memory}


def reset_peak_rss(device: torch.device) -> float:
    """Let the peak of memory begin anew at what is held now, and say how much that is, in MiB."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        return torch.accelerator.memory_allocated() / 2**20
    PEAK_RESET.write_text("5")
    return memory_mib("status", "VmRSS", process=os.getpid())


def peak_mib(device: torch.device) -> float:
    """The most memory that was held since `forget_peak`."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated() / 2**20
    return memory_mib("status", "VmHWM", process=os.getpid())


def memory_mib(file: str, *fields: str, process: int) -> float:
    """Sum of some fields of a file of a process in /proc, which gives them in kB."""
    text = Path(f"/proc/{process}/{file}").read_text()
    return sum(int(kb) for kb in re.findall(rf"^(?:{'|'.join(fields)}):\s+(\d+) kB", text, re.MULTILINE)) / 1024
