"""Description of the machine: hardware, versions and commit."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from detection.runtime.device import device_name, select_device

PACKAGES = ("torch", "torchvision", "torchcodec", "numpy", "pillow", "pycocotools", "hotcoco")
DRIVERS = ("nvidia", "amdgpu", "xe", "i915")  # kernel modules of accelerators
RESULTS = Path(__file__).parent / "results"


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Return hardware, versions and commit. device: the one that a run would choose if None."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=RESULTS.parent, check=True).stdout.strip()
    return {
        "hardware": device_name(device or select_device("auto", local_rank=0)),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "driver": driver_version(),
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "commit": commit,
    }


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
    versions = [
        path.read_text().strip() for path in Path("/sys/module").glob("*/version") if path.parent.name in DRIVERS
    ]
    return " ".join(versions)
