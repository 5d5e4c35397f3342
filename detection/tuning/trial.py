"""One measurement of training with certain settings: the mode bench-train in processes of its own."""

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

Ending = Literal["measured", "out of memory", "out of time", "failed"]

END_S = 40  # the launcher itself gives its ranks 30 s

# A rank has its share of the cores, unless the user says otherwise: torchrun would give each of several one thread.
SHARE_CORES = 'export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$1}; shift; exec "$@"'


@dataclass(frozen=True)
class Trial:
    """What came of a measurement.

    images_per_s: of all ranks, the median of the steps. step_ms: the median. data_share: of a step's time that is spent
    waiting for data. precision: what "auto" came to. spent_s: from start to end of its processes. why: it failed.
    """

    settings: Mapping[str, str]
    ending: Ending
    spent_s: float
    images_per_s: float = 0.0
    step_ms: float = 0.0
    data_share: float = 0.0
    precision: str = ""
    why: str = ""


def run(
    module: str,
    flags: Sequence[str],
    settings: Mapping[str, str],
    *,
    ranks: int,
    steps: int,
    warmup: int,
    limit_s: float,
) -> Trial:
    """Measure `steps` steps of a benchmark's training module on this machine, after `warmup` others.

    flags: of the run. settings: those that are tried, by name. After limit_s it is ended, with all its processes.
    """
    with tempfile.TemporaryDirectory(prefix="tune-") as folder:
        summary = Path(folder, "summary.json")
        tried = config_file.flags(settings)
        measured = ["--mode", "bench-train", "--benchmark-input", "real", "--benchmark-steps", str(steps)]
        measured += [
            "--benchmark-warmup",
            str(warmup),
            "--summary-json",
            str(summary),
            "--run-dir",
            str(Path(folder, "run")),
        ]
        cores = max(1, len(os.sched_getaffinity(0)) // ranks)
        launch = [sys.executable, "-m", "detection.runtime.launch", "--nproc-per-node", str(ranks), "-m", module]
        start_s = time.monotonic()
        with Path(folder, "stderr").open("w+", errors="replace") as stderr:
            process = subprocess.Popen(
                ["bash", "-c", SHARE_CORES, "tune", str(cores), *launch, *flags, *tried, *measured],
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                status = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                return Trial(settings, "out of time", limit_s, why=f"stopped after {limit_s:.0f} s")
            finally:
                end(process)
            stderr.seek(0)
            said = stderr.read()
        spent_s = time.monotonic() - start_s
        if status:
            killed = status == 128 + signal.SIGKILL
            ending: Ending = "out of memory" if killed or is_out_of_memory(said) else "failed"
            return Trial(settings, ending, spent_s, why=cause(said, status))
        found = json.loads(summary.read_text())
    (result,) = found["results"]
    return Trial(
        settings,
        "measured",
        spent_s,
        images_per_s=result["images_per_s"]["median"],
        step_ms=result["latency_ms"]["median"],
        data_share=result["share"]["data"],
        precision=found["precision"],
    )


def cause(said: str, status: int) -> str:
    """The last line about an error but the launcher's own, which only names the rank."""
    errors = [line.strip() for line in said.splitlines() if "rror" in line]
    return ([line for line in errors if not line.startswith("error: rank ")] or errors or [f"status {status}"])[-1]


def end(process: subprocess.Popen[bytes]) -> None:
    """End the launcher, which ends the ranks: these are in sessions of their own."""
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
