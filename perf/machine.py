"""What was measured on: hardware, versions, commit."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from detection.device import choose, describe

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What was measured on, and what was measured."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=RESULTS.parent, check=True).stdout.strip()
    return {
        "hardware": describe(choose("auto", local_rank=0)),
        "processor": processor(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "torchvision", "numpy", "pycocotools")},
        "threads": torch.get_num_threads(),
        "commit": commit,
    }


def processor() -> str:
    """Name of the CPU, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
