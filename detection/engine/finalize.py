"""End of a run: final metrics verified, log checked, files listed."""

import json
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from detection import run_dir
from detection.atomic_file import atomic_write
from detection.engine.state import RunContext
from detection.engine.workload import EXIT_TARGET_NOT_REACHED, TrainResult
from mlperf import compliance

METRIC_TOLERANCE = 1e-9  # the libraries add in different orders


class Evaluator(Protocol):
    """Results of the last evaluation."""

    per_class_ap: list[dict[str, object]]
    """Name, AP and number of ground-truth objects of each category, set by `verify_official`."""

    def verify_official(self) -> dict[str, float]:
        """Recompute the metrics with pycocotools."""

    def coco_results(self) -> Mapping[str, list[dict[str, object]]]:
        """Return the detections in COCO's results format, by file name."""


def finalize_run(result: TrainResult, run: RunContext, evaluator: Evaluator) -> int:
    """Write the detections, check the log, verify the final metrics and list all files. Return the exit status.

    All ranks return together, since the launcher terminates the others as soon as one exits with a status.
    """
    is_valid = True
    with run.watchdog.extended():
        if run.ranks.is_main:
            for name, detections in evaluator.coco_results().items():
                write_json(run, name, detections)
            if run.config.mode == "train":
                print_result(result, run)
            official = evaluator.verify_official() if result.metrics else {}
            write_json(run, "classes.json", evaluator.per_class_ap)
            print_run_files(run.folder)
            is_valid = (not official or is_confirmed(result.metrics, official, run)) and is_log_complete(run)
        is_valid = run.ranks.broadcast(is_valid)
    if not is_valid:
        return 1
    return 0 if result.target_reached or run.config.mode == "evaluate" else EXIT_TARGET_NOT_REACHED


def write_json(run: RunContext, name: str, value: object) -> None:
    """Write a file of the run folder. On a full disk, warn, since the log is complete without it."""
    try:
        with atomic_write(run.folder / name) as partial:
            partial.write_text(json.dumps(value))
    except OSError as error:
        run.logger.print(f"warning: {run.folder / name}: not written ({error.strerror})")


def is_confirmed(metrics: Mapping[str, float], official: Mapping[str, float], run: RunContext) -> bool:
    """Return whether pycocotools confirms the metrics up to rounding, and print the verdict with any difference."""
    difference = max(abs(metrics[name] - value) for name, value in official.items())
    if not difference <= METRIC_TOLERANCE:
        print(
            f"error: final metrics: pycocotools computes {format_targets(official, run)} (largest difference of any "
            f"metric: {difference:.1e}). Run again with --coco-eval-backend pycocotools.",
            file=sys.stderr,
        )
        return False
    print("pycocotools confirms the final metrics" + (f" within {difference:.1e}" if difference else ""))
    return True


def is_log_complete(run: RunContext) -> bool:
    """Return whether every line of the MLPerf log was written, and print an error if not."""
    if run.log.write_error:
        reason = run.log.write_error.strerror
        print(f"error: the MLPerf log is incomplete ({reason}) and cannot be submitted", file=sys.stderr)
    return run.log.write_error is None


def print_result(result: TrainResult, run: RunContext) -> None:
    """Print the final metrics, and the verdict of the compliance checker on the log."""
    status = "target reached" if result.target_reached else f"target not reached in {run.config.epochs} epochs"
    targets = ", ".join(map(str, run.logger.metadata["targets"].values()))
    print(f"{format_targets(result.metrics, run)} after epoch {result.epoch}, target {targets}: {status}")
    if run.logger.num_skipped:
        print(f"fp16 loss scaling skipped {run.logger.num_skipped} steps, which advanced the learning-rate schedule")
    verdict = compliance.check(run_dir.log_path(run.folder, run.config.run_index), run.config.ruleset)
    print(f"MLPerf compliance ({verdict.ruleset}): {'PASS' if verdict.passed else 'FAIL'}")
    for message in verdict.messages:
        print(f"  {message}")


def format_targets(metrics: Mapping[str, float], run: RunContext) -> str:
    """Format the metrics that have a target."""
    return ", ".join(f"{name} {metrics[name]:.4f}" for name in run.logger.metadata["targets"])


def print_run_files(folder: Path) -> None:
    """List the files of the run folder, and the number of files in its folders."""
    names = [
        f"{path.name}/ ({sum(1 for _ in path.iterdir())})" if path.is_dir() else path.name
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".")
    ]
    print(f"Run folder {folder}/:")
    print(textwrap.fill(", ".join(names), width=80, initial_indent="  ", subsequent_indent="  "))
