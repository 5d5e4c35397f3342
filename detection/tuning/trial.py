"""One timing of training with given settings: `--mode bench-train` in separate processes."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from detection.runtime.device import is_out_of_memory
from detection.tuning import config_file

TrialStatus = Literal["measured", "out of memory", "out of time", "failed"]

TERMINATE_TIMEOUT_S = 40  # the launcher waits 30 s for its ranks

# Divide the cores among the ranks unless the user sets OMP_NUM_THREADS: torchrun would give each rank one thread.
SET_OMP_THREADS = 'export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$1}; shift; exec "$@"'


@dataclass(frozen=True)
class Trial:
    """Result of one timing.

    images_per_s: over all ranks, median of the steps. step_ms: median. data_fraction: fraction of a step that waits for
    data. precision: the resolved value of "auto". elapsed_s: from start to end of the processes. reason: of a failure.
    """

    settings: Mapping[str, str]
    status: TrialStatus
    elapsed_s: float
    images_per_s: float = 0.0
    step_ms: float = 0.0
    data_fraction: float = 0.0
    precision: str = ""
    reason: str = ""


def measure_training(
    package: str,
    flags: Sequence[str],
    settings: Mapping[str, str],
    *,
    ranks: int,
    steps: int,
    warmup: int,
    limit_s: float,
) -> Trial:
    """Time `steps` training steps of a workload on this machine, after `warmup` steps.

    flags: of the run. settings: the tried ones, by name. Terminates all processes after limit_s seconds.
    """
    with tempfile.TemporaryDirectory(prefix="tune-") as folder:
        summary = Path(folder, "summary.json")
        measurement = {"mode": "bench-train", "benchmark_input": "real", "benchmark_steps": str(steps)}
        measurement |= {"benchmark_warmup": str(warmup), "summary_json": str(summary), "run_dir": f"{folder}/run"}
        trial_flags = config_file.to_flags({**settings, **measurement})
        cores = max(1, len(os.sched_getaffinity(0)) // ranks)
        rank = ["-m", package, "train"]
        launch = [sys.executable, "-m", "detection.runtime.launch", "--nproc-per-node", str(ranks), *rank]
        start_s = time.monotonic()
        with Path(folder, "stderr").open("w+", errors="replace") as stderr:
            process = subprocess.Popen(
                ["bash", "-c", SET_OMP_THREADS, "tune", str(cores), *launch, *flags, *trial_flags],
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                exit_status = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                return Trial(settings, "out of time", limit_s, reason=f"stopped after {limit_s:.0f} s")
            finally:
                terminate(process)
            stderr.seek(0)
            stderr_text = stderr.read()
        elapsed_s = time.monotonic() - start_s
        if exit_status:
            is_killed = exit_status == 128 + signal.SIGKILL
            trial_status: TrialStatus = "out of memory" if is_killed or is_out_of_memory(stderr_text) else "failed"
            return Trial(settings, trial_status, elapsed_s, reason=last_error(stderr_text, exit_status))
        measured = json.loads(summary.read_text())
    (result,) = measured["results"]
    return Trial(
        settings,
        "measured",
        elapsed_s,
        images_per_s=result["images_per_s"]["median"],
        step_ms=result["latency_ms"]["median"],
        data_fraction=result["time_fraction"]["data"],
        precision=measured["precision"],
    )


def last_error(stderr_text: str, exit_status: int) -> str:
    """Return the last line about an error. Skips the launcher's lines, which only name the rank."""
    errors = [line.strip() for line in stderr_text.splitlines() if "rror" in line]
    return ([line for line in errors if not line.startswith("error: rank ")] or errors or [f"status {exit_status}"])[-1]


def terminate(process: subprocess.Popen[bytes]) -> None:
    """Terminate the launcher, which terminates its ranks. Each rank has its own session."""
    process.terminate()
    try:
        process.wait(TERMINATE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
