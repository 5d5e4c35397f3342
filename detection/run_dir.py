"""Run folder: its file names, and the unfinished run to resume. Imports no torch, so that checks respond at once."""

import re
from dataclasses import dataclass
from pathlib import Path

from mlperf.log import read

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
METRICS = "metrics.jsonl"
CHECKPOINT_PATTERN = re.compile(r"epoch_(\d+)_step_(\d+)(?:_ap_(\d\.\d+))?\.pt")


@dataclass(frozen=True, order=True)
class CheckpointFile:
    """Checkpoint file with the epoch (from 1), step count and score that its name contains.

    A checkpoint without a score was saved in the middle of an epoch. Instances sort by age, oldest first.
    """

    epoch: int
    step: int
    has_score: bool
    score: float
    path: Path


def checkpoint_name(epoch: int, step: int, score: float | None) -> str:
    """Return the file name of a checkpoint."""
    return f"epoch_{epoch:04d}_step_{step:07d}" + ("" if score is None else f"_ap_{max(0.0, score):.4f}") + ".pt"


def list_checkpoints(folder: Path) -> list[CheckpointFile]:
    """Return the checkpoints of a run folder, oldest first."""
    matches = ((path, CHECKPOINT_PATTERN.fullmatch(path.name)) for path in (folder / CHECKPOINTS).glob("*.pt"))
    return sorted(
        CheckpointFile(int(match[1]), int(match[2]), match[3] is not None, float(match[3] or 0), path)
        for path, match in matches
        if match
    )


def log_path(folder: Path, run_index: int) -> Path:
    """Return the path of a run's MLPerf log."""
    return folder / f"result_{run_index}.txt"


def truncate_log(path: Path, num_bytes: int) -> None:
    """Truncate a log to its length at a checkpoint. Append the removed lines to `<name>.cut` in the same folder."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        file.seek(num_bytes)
        if tail := file.read():
            with path.with_name(path.name + ".cut").open("ab") as cut_file:
                cut_file.write(tail)
            file.truncate(num_bytes)


def is_finished(folder: Path, run_index: int, num_epochs: int) -> bool:
    """Return whether a run reached its target or was evaluated after its last epoch."""
    checkpoints = list_checkpoints(folder)
    if checkpoints and checkpoints[-1].has_score and checkpoints[-1].epoch >= num_epochs:
        return True
    try:
        events = read(log_path(folder, run_index))
    except (OSError, ValueError):
        return False
    return any(event.key == "run_stop" and event.metadata.get("status") == "success" for event in events)


def latest_unfinished(parent: Path, run_index: int, num_epochs: int) -> Path | None:
    """Return the latest unfinished run in a folder that has a checkpoint, or None."""
    for folder in sorted(parent.glob("*"), reverse=True):
        if list_checkpoints(folder) and not is_finished(folder, run_index, num_epochs):
            return folder
    return None
