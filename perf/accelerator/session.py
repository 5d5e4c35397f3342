"""Session on an accelerator: runs measurements as commands with a deadline, and keeps the record of their results."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from detection.atomic_file import atomic_write
from detection.runtime.parent_process import set_death_signal
from detection.tuning.trial import last_error
from perf.machine import ROOT, source_commit

TERMINATE_TIMEOUT_S = 5  # for a command to end its children
OUTPUT_LINES = 20  # of a failed command, in the record


class MeasurementError(Exception):
    """Failure of a measurement. status: "failed", "rejected" (invalid on this machine) or "out of time"."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Measurement:
    """One measurement: returns its result, or raises MeasurementError."""

    name: str
    run: Callable[["Session"], Mapping[str, Any]]


@dataclass(frozen=True)
class Stage:
    """Measurements that belong together. seconds: the time that they need on an H100, relative to other stages."""

    name: str
    title: str
    seconds: float
    measurements: Sequence[Measurement]


class Session:
    """Record and commands of a session.

    deadline_s: end of the current measurement, by `time.monotonic`. summary_file: rewritten after each measurement.
    """

    def __init__(self, out: Path, device: str, *, rehearse: bool, minutes: float):
        self.out, self.device, self.rehearse = out.absolute(), device, rehearse
        self.deadline_s = 0.0
        self.summary_file = self.out / "summary.json"
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        self.summary: dict[str, Any] = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": source_commit(),
            "minutes": minutes,
            "rehearsal": rehearse,
            "stages": {},
        }
        self.write()

    @property
    def all_succeeded(self) -> bool:
        """True if every measurement so far succeeded."""
        stages = self.summary["stages"].values()
        return all(result["status"] == "ok" for stage in stages for result in stage["results"].values())

    @property
    def remaining_s(self) -> float:
        """Time until the deadline of the measurement."""
        return self.deadline_s - time.monotonic()

    def run_stage(self, stage: Stage, limit_s: float) -> None:
        """Run the measurements of a stage, and record each as soon as it ends.

        A measurement gets at most about twice its part of the time that remains, so that one that hangs leaves time.
        """
        start_s = time.monotonic()
        end_s = start_s + limit_s
        record: dict[str, Any] = {"title": stage.title, "limit_s": round(limit_s, 1), "results": {}}
        self.summary["stages"][stage.name] = record
        print(f"\n{stage.name}: {stage.title}, up to {limit_s:.0f} s", flush=True)
        for waiting, measurement in zip(range(len(stage.measurements), 0, -1), stage.measurements, strict=True):
            measurement_start_s = time.monotonic()
            self.deadline_s = measurement_start_s + 2 / (waiting + 1) * (end_s - measurement_start_s)
            result = self.measure(measurement)
            elapsed_s = time.monotonic() - measurement_start_s
            record["results"][measurement.name] = result | {"elapsed_s": round(elapsed_s, 1)}
            record["elapsed_s"] = round(time.monotonic() - start_s, 1)
            self.write()
            print(f"  {measurement.name:<36} {result['status']:<12} {describe(result)}", flush=True)

    def measure(self, measurement: Measurement) -> dict[str, Any]:
        """Return the result of a measurement with its status."""
        if self.remaining_s <= 0:
            return {"status": "out of time", "reason": "the stage had no time left"}
        try:
            return {**measurement.run(self), "status": "ok"}
        except MeasurementError as error:
            return {"status": error.status, "reason": str(error)}
        except Exception as error:  # a fault in one measurement must not cost the others
            return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}

    def write(self) -> None:
        """Write the record of everything so far."""
        with atomic_write(self.summary_file) as partial_file:
            partial_file.write_text(json.dumps(self.summary, indent=1) + "\n")

    def result(self, stage: str, measurement: str) -> Mapping[str, Any]:
        """Return an earlier result, or {} if there is none."""
        found: Mapping[str, Any] = self.summary["stages"].get(stage, {}).get("results", {}).get(measurement, {})
        return found

    def python(
        self, name: str, *words: str, statuses: Sequence[int] = (0,), environ: Mapping[str, str] | None = None
    ) -> str:
        """Run `python WORDS` until the deadline, and return its output, which logs/NAME.txt keeps.

        statuses: expected exit statuses. environ: variables in addition to those of this process.
        """
        log = self.out / "logs" / f"{name}.txt"
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(environ or {}),
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=set_death_signal,
            )
            try:
                exit_status = process.wait(max(0.0, self.remaining_s))
            except subprocess.TimeoutExpired:
                exit_status = None
            finally:
                end_group(process)
        output = log.read_text(errors="replace")
        if exit_status is None:
            raise MeasurementError("out of time", f"stopped; last output: {last_lines(output, 1)}")
        if exit_status not in statuses:
            status = "rejected" if exit_status == 2 else "failed"
            raise MeasurementError(status, f"exit status {exit_status}: {last_error(output, exit_status)}")
        return output


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a command and the processes of its group."""
    if process.poll() is None:
        process.terminate()  # a launcher ends its ranks, which have their own groups
        with suppress(subprocess.TimeoutExpired):
            process.wait(TERMINATE_TIMEOUT_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_lines(text: str, count: int = OUTPUT_LINES) -> str:
    """Return the last lines of a text."""
    return "\n".join(text.strip().splitlines()[-count:])


def describe(result: Mapping[str, Any]) -> str:
    """Return a result as one line."""
    if "reason" in result:
        return str(result["reason"]).splitlines()[0][:160]
    shown = {key: value for key, value in result.items() if isinstance(value, (int, float, str)) and key != "status"}
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )
