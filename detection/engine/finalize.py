"""The end of a run: the last figures confirmed, the log checked, and where everything lies."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from detection import run_dir
from detection.engine.state import Run
from detection.engine.train_loop import NOT_REACHED, Outcome
from mlperf import compliance


class Evaluation(Protocol):
    """What was found at the last evaluation."""

    by_class: list[dict[str, object]]
    """Of each category its name, its AP and how many objects the truth has, once the figures are confirmed."""

    def confirm(self) -> dict[str, float]:
        """The figures again, by the official library."""

    def results(self) -> Mapping[str, list[dict[str, object]]]:
        """The detections in COCO's format, by the names of their files."""


def conclude(outcome: Outcome, run: Run, evaluation: Evaluation) -> int:
    """Have the log and the last figures checked, write the detections, say where all lies; returns the exit status."""
    if run.ranks.is_first:
        for name, detections in evaluation.results().items():
            (run.folder / name).write_text(json.dumps(detections))
        if run.config.mode == "train":
            report(outcome, run)
        official = evaluation.confirm()
        (run.folder / "classes.json").write_text(json.dumps(evaluation.by_class))
        show_files(run.folder)
        if official != outcome.metrics:
            said = shown(official, run)
            print(f"error: pycocotools says {said}. Run again with --coco-eval-backend pycocotools.", file=sys.stderr)
            return 1
        print("pycocotools confirms the last figures")
        if run.log.broken:
            print(f"error: the log has a gap ({run.log.broken.strerror}): it proves nothing", file=sys.stderr)
            return 1
    return 0 if outcome.reached or run.config.mode == "evaluate" else NOT_REACHED


def report(outcome: Outcome, run: Run) -> None:
    """Print how the run ended, and the checker's verdict on its log."""
    reached = "the target is reached" if outcome.reached else f"the {run.config.epochs} epochs are used up"
    targets = ", ".join(map(str, run.progress.facts["targets"].values()))
    print(f"{shown(outcome.metrics, run)} after epoch {outcome.epoch}, target {targets}: {reached}")
    verdict = compliance.check(run_dir.log_file(run.folder, run.config.run_index), run.config.ruleset)
    print(f"MLPerf compliance ({verdict.ruleset}): {'PASS' if verdict.passed else 'FAIL'}")
    for message in verdict.messages:
        print(f"  {message}")


def shown(metrics: Mapping[str, float], run: Run) -> str:
    """The figures that the run is held to, for people."""
    return ", ".join(f"{name} {metrics[name]:.4f}" for name in run.progress.facts["targets"])


def show_files(folder: Path) -> None:
    """Print where the files of the run are."""
    print(f"The run lies in {folder}/:")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            print(f"  {path.relative_to(folder)}")
