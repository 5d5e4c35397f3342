"""Runs of the dummy workload in separate processes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from detection import run_dir
from forked import Forked
from paths import ROOT

SEARCH_PATH = f"{ROOT}:{ROOT / 'tests' / 'support'}"  # of new interpreters, since nothing is installed
DUMMY_WORKLOAD = str(ROOT / "tests" / "support" / "dummy_workload.py")


def environment(**extra: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "DUMMY_DEVICE": "cpu", "PYTHONPATH": SEARCH_PATH} | extra


def command(run: Path, *flags: str, ranks: int = 0, launch: tuple[str, ...] = ()) -> list[str]:
    """Return the command of a run. With 0 ranks it needs no launcher."""
    flags = ("--run-dir", str(run), "--seed", "5", "--precision", "fp32", "--num-workers", "0", *flags)
    if not ranks:
        return [sys.executable, DUMMY_WORKLOAD, *flags]
    return [
        sys.executable,
        "-m",
        "detection.runtime.launch",
        "--nproc-per-node",
        str(ranks),
        *launch,
        DUMMY_WORKLOAD,
        *flags,
    ]


def start(
    run: Path, *flags: str, ranks: int = 0, launch: tuple[str, ...] = (), **extra: str
) -> subprocess.Popen[str] | Forked:
    words = command(run, *flags, ranks=ranks, launch=launch)
    if "PYTHONPATH" not in extra:  # PYTHONPATH needs a new interpreter
        return Forked(words[1:], environment(**extra))
    return subprocess.Popen(
        words,
        env=environment(**extra),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str] | Forked, timeout_s: float = 180) -> tuple[int, str, str]:
    """Wait for a process and return status, stdout and stderr. Kill it and fail on a timeout."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise
    return process.returncode, out, err


def run(folder: Path, *flags: str, ranks: int = 0, timeout_s: float = 180, **extra: str) -> tuple[int, str, str]:
    return finish(start(folder, *flags, ranks=ranks, **extra), timeout_s)


def wait_for(path: Path, text: str, timeout_s: float = 120) -> None:
    """Wait until a file contains a text."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} never contained {text!r}")


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return weights, buffers and momenta of the latest checkpoint."""
    state = torch.load(run_dir.list_checkpoints(folder)[-1].path, weights_only=True)
    momenta = {f"momentum {i}": slot["momentum_buffer"] for i, slot in state["optimizer"]["state"].items()}
    return state["model"] | {"batch norm": state["batch_norm"]} | momenta


def bit_identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def metrics(folder: Path, event: str = "") -> list[dict[str, Any]]:
    """Return the events in metrics.jsonl, or those with a name."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if event in ("", line["event"])]


def steps(folder: Path) -> list[int]:
    return [step["step"] for step in metrics(folder, "step")]


def losses(folder: Path) -> list[float]:
    return [step["loss"] for step in metrics(folder, "step")]


def alive(group: int) -> bool:
    """Return whether a session still has processes."""
    return subprocess.run(["pgrep", "-s", str(group)], capture_output=True, check=False).returncode == 0
