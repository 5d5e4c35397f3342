"""A run's folder: the names in it, and which run is to be resumed. Without torch, so that checks answer at once."""

import re
from dataclasses import dataclass
from pathlib import Path

from mlperf.log import read

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
METRICS = "metrics.jsonl"
BOARD = "tensorboard"
NAME = re.compile(r"epoch_(\d+)_step_(\d+)(?:_ap_(\d\.\d+))?\.pt")


@dataclass(frozen=True, order=True)
class Saved:
    """A checkpoint's file, as its name says: in which epoch (from 1), after how many steps, with which score.

    One without a score was written in the middle of an epoch. They are ordered by age, the oldest first.
    """

    epoch: int
    step: int
    evaluated: bool
    score: float
    path: Path


def checkpoint_name(epoch: int, step: int, score: float | None) -> str:
    """The name of a checkpoint's file."""
    return f"epoch_{epoch:04d}_step_{step:07d}" + ("" if score is None else f"_ap_{max(0.0, score):.4f}") + ".pt"


def checkpoints(folder: Path) -> list[Saved]:
    """The checkpoints of a run's folder, the oldest first."""
    matches = ((path, NAME.fullmatch(path.name)) for path in (folder / CHECKPOINTS).glob("*.pt"))
    return sorted(
        Saved(int(match[1]), int(match[2]), match[3] is not None, float(match[3] or 0), path)
        for path, match in matches
        if match
    )


def log_file(folder: Path, experiment: int) -> Path:
    """The MLPerf log of a run."""
    return folder / f"result_{experiment}.txt"


def cut(path: Path, num_bytes: int) -> None:
    """Shorten a log to what it held at a checkpoint; what came after it is kept in a file beside it, *.cut."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        file.seek(num_bytes)
        if after := file.read():
            with path.with_name(path.name + ".cut").open("ab") as kept:
                kept.write(after)
            file.truncate(num_bytes)


def is_finished(folder: Path, experiment: int, num_epochs: int) -> bool:
    """Whether a run has met its target, or has been evaluated after its last epoch."""
    saved = checkpoints(folder)
    if saved and saved[-1].evaluated and saved[-1].epoch >= num_epochs:
        return True
    try:
        events = read(log_file(folder, experiment))
    except (OSError, ValueError):
        return False
    return any(event.key == "run_stop" and event.metadata.get("status") == "success" for event in events)


def newest_unfinished(parent: Path, experiment: int, num_epochs: int) -> Path | None:
    """The last of the runs in a folder that left a checkpoint and are not finished; None where there is none."""
    for folder in sorted(parent.glob("*"), reverse=True):
        if checkpoints(folder) and not is_finished(folder, experiment, num_epochs):
            return folder
    return None
