"""Description of the machine: hardware, versions, commit and load."""

import ctypes
import gc
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from detection.config.settings import InputError
from detection.runtime.device import backend_module, device_name, select_device

PACKAGES = ("torch", "torchvision", "torchcodec", "numpy", "pillow", "pycocotools", "hotcoco")
DRIVERS = ("nvidia", "amdgpu", "xe", "i915")  # kernel modules of accelerators
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "perf" / "results"
PEAK_RESET = Path("/proc/self/clear_refs")  # "5" sets the peak memory to what the process holds
IDLE_PERCENT = 10  # of one core that other processes may use


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Return hardware, versions and commit. device: the one that a run would choose if None."""
    return {
        "hardware": device_name(device or select_device("auto", local_rank=0)),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "driver": driver_version(),
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "commit": source_commit(),
    }


class LoadMeter:
    """Load of the machine: the load average at the start, and the CPU use of other processes since."""

    def __init__(self) -> None:
        self.load_1min = os.getloadavg()[0]
        self.start_s, self.start_busy_s, self.start_own_s = time.perf_counter(), busy_cpu_s(), own_cpu_s()

    def read(self, own_s: float | None = None) -> dict[str, Any]:
        """Return the load so far. own_s: CPU time of the measured processes, by default this one and its children."""
        own_s = own_cpu_s() - self.start_own_s if own_s is None else own_s
        other_s = busy_cpu_s() - self.start_busy_s - own_s
        percent = max(0.0, 100 * other_s / (time.perf_counter() - self.start_s))
        load = {"load_1min": round(self.load_1min, 2), "other_cpu_percent": round(percent)}
        return load | {"is_idle": percent <= IDLE_PERCENT}


def own_cpu_s() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def busy_cpu_s() -> float:
    """Return the seconds that all cores have computed since the machine started, for any process."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def source_commit(root: Path = ROOT) -> str:
    """Return the short commit, with "-dirty" if files other than documents and results differ, or "unknown"."""
    git = ["git", "-C", str(root), "-c", f"safe.directory={root}"]
    status = [*git, "status", "--porcelain", "--", ".", ":(exclude)docs", ":(exclude)perf/results"]
    commands = ([*git, "rev-parse", "--short", "HEAD"], status)
    try:
        head, changes = (subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("-dirty" if changes else "")


def select_out(out: Path | None, default: Path, commit: str, *, allow_dirty: bool = False) -> Path:
    """Return `out`, or `default` if None. Raise InputError if it is in the repository and the commit is not clean.

    allow_dirty: replace `default` by a temporary folder, and protect only the folder `default`.
    """
    is_clean = commit != "unknown" and not commit.endswith("-dirty")
    if out is None:
        out = Path(tempfile.mkdtemp(prefix="perf-results-")) if allow_dirty and not is_clean else default
    if not is_clean and out.resolve().is_relative_to(default if allow_dirty else ROOT):
        raise InputError(
            f"{out}: results of commit {commit} are not reproducible. Commit all files, pass --out with a folder "
            "outside the repository, or pass --allow-dirty to write to a temporary folder."
        )
    return out


def reports_memory(device: torch.device) -> bool:
    """Return whether torch reports the memory of a device."""
    return device.type == "cpu" or hasattr(backend_module(device), "reset_peak_memory_stats")


def peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """Return the peak memory during a call, above what is held before: of this process, or of the accelerator."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # give back what earlier calls freed, which this one would use unseen
    before = memory_mib(device, "VmRSS", reset_peak=True)
    call()
    return max(1.0, memory_mib(device, "VmHWM") - before)


def memory_mib(device: torch.device, field: str, *, reset_peak: bool = False) -> float:
    """Return the memory of this process: VmRSS is what it holds, VmHWM the peak. reset_peak: to the former, before."""
    if device.type == "cpu":
        if reset_peak:
            PEAK_RESET.write_text("5")
        return process_mib(os.getpid(), "status", field)
    backend = backend_module(device)
    if reset_peak:
        backend.reset_peak_memory_stats(device)
    peak: int = backend.max_memory_allocated(device)
    return peak / 2**20


def process_mib(pid: int, file: str, *fields: str) -> float:
    """Return the sum of some fields of a file of a process in /proc, in MiB."""
    text = Path(f"/proc/{pid}/{file}").read_text()
    return sum(int(kib) for kib in re.findall(rf"^(?:{'|'.join(fields)}):\s+(\d+) kB", text, re.MULTILINE)) / 1024


def package_version(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed, as with some older builds of torch."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor_name() -> str:
    """Return the model name of the CPU, or its architecture if the system does not report one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def driver_version() -> str:
    """Return the version of the accelerator's kernel driver, or "" if the system does not report one."""
    paths = [path for path in Path("/sys/module").glob("*/version") if path.parent.name in DRIVERS]
    return " ".join(path.read_text().strip() for path in paths)
