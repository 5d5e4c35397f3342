"""Checkpoint to resume an interrupted run from."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detection import run_dir
from detection.checkpoint import checkpointer
from detection.config.run_config import RunConfig
from detection.config.settings import InputError, to_json

# Settings that may change when a run is resumed: they have no effect on training.
MUTABLE_SETTINGS = {
    "resume", "run_dir", "log_dir", "max_steps", "log_every", "num_workers", "checkpoint_every", "run_index",
    "weights", "eval_before_training", "summary_json", "tensorboard", "echo_log",
}  # fmt: skip


@dataclass(frozen=True)
class ResumePoint:
    """Checkpoint that a run resumes from.

    appends_to_log: the checkpoint is from the same run folder, whose log was truncated to that point. Otherwise the run
    starts a new log.
    """

    path: Path
    state: Mapping[str, Any]
    appends_to_log: bool


def find_resume_point(config: RunConfig, folder: Path, log: Callable[[str], None] = print) -> ResumePoint | None:
    """Return the checkpoint that `config.resume` selects, and truncate the logs of the run folder to it.

    Return None to start from scratch. Raise InputError if a named checkpoint is unusable.
    """
    if config.resume == "none":
        return None
    if config.resume == "auto":
        if run_dir.is_finished(folder, config.run_index, config.epochs):
            raise InputError(f"run in {folder}: finished, nothing to resume. Omit --resume.")
        latest = checkpointer.latest_valid(folder, benchmark=config.benchmark, log=log)
        if latest is None:
            log(f"nothing to resume in {folder}: starting from scratch")
            archive_logs(folder, config.run_index)
            return None
        path, state = latest[0].path, latest[1]
    else:
        path = Path(config.resume)
        state = checkpointer.load(path, benchmark=config.benchmark)
    check_usable(config, path, state)
    appends_to_log = path.resolve().parent.parent == folder.resolve()
    if appends_to_log:
        run_dir.truncate_log(run_dir.log_path(folder, config.run_index), state["written"]["log"])
        run_dir.truncate_log(folder / run_dir.METRICS, state["written"]["metrics"])
    log(f"resuming from {path}")
    for name, (old, new) in changed_settings(json.loads(state["config"]), json.loads(to_json(config))).items():
        log(f"warning: {name} is {new}, but was {old} when the checkpoint was saved")
    return ResumePoint(path, state, appends_to_log)


def check_usable(config: RunConfig, path: Path, state: Mapping[str, Any]) -> None:
    """Raise InputError if the settings leave nothing to train after a checkpoint, or set another seed."""
    if state["evaluated"] and state["epoch"] >= config.epochs:
        raise InputError(f"{path}: all {config.epochs} epochs are complete. Pass more --epochs.")
    if config.seed not in (None, state["seed"]):
        raise InputError(f"--seed {config.seed}: {path} was trained with seed {state['seed']}. Omit --seed.")


def archive_logs(folder: Path, run_index: int) -> None:
    """Archive the logs of a run that saved no checkpoint."""
    for path in (run_dir.log_path(folder, run_index), folder / run_dir.METRICS):
        run_dir.truncate_log(path, 0)
        path.unlink(missing_ok=True)


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, as (old, new) by name."""
    names = [name for name in new if name not in MUTABLE_SETTINGS | {"seed"}]
    return {name: (old.get(name), new[name]) for name in names if old.get(name) != new[name]}
