"""What was measured on: hardware, versions, commit."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from detection.runtime.device import choose, describe

PACKAGES = ("torch", "torchvision", "torchcodec", "numpy", "pillow", "pycocotools", "hotcoco")
DRIVERS = ("nvidia", "amdgpu", "xe", "i915")  # kernel modules of accelerators
RESULTS = Path(__file__).parent / "results"


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """What was measured on, and what was measured. device: in place of the one that a run takes."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=RESULTS.parent, check=True).stdout.strip()
    return {
        "hardware": describe(device or choose("auto", local_rank=0)),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "driver": driver(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "commit": commit,
    }


def installed(package: str) -> str | None:
    """Version of a package; None where it is not installed, as some are not beside an older torch."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """Name of the CPU, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def driver() -> str:
    """Version of the accelerator's kernel driver, where the system tells it; empty elsewhere."""
    versions = [
        path.read_text().strip() for path in Path("/sys/module").glob("*/version") if path.parent.name in DRIVERS
    ]
    return " ".join(versions)
