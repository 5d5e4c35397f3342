"""Checkpoint to resume an interrupted run from."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detection import run_dir
from detection.checkpoint import checkpointer
from detection.config.run_config import RunConfig
from detection.config.settings import InputError, to_json
from detection.data import num_classes

# Settings that may change when a run is resumed: they have no effect on training.
MUTABLE_SETTINGS = {
    "resume", "run_dir", "log_dir", "max_steps", "log_every", "num_workers", "checkpoint_every", "run_index",
    "weights", "eval_before_training", "summary_json", "tensorboard", "wandb", "mlflow",
    "echo_log",
}  # fmt: skip

# Settings that decide how parameters are trained, which of them, and which group each is in.
OPTIMIZER_SETTINGS = {"optimizer", "weight_decay_on_bias_and_norm", "bias_lr_factor", "freeze_batch_norm", "freeze_at"}


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
    selected = select_checkpoint(config, folder, log)
    if selected is None:
        log(f"nothing to resume in {folder}: starting from scratch")
        archive_logs(folder, config.run_index)
        return None
    path, state = selected
    appends_to_log = path.resolve().parent.parent == folder.resolve()
    if appends_to_log:
        run_dir.truncate_log(run_dir.log_path(folder, config.run_index), state["written"]["log"])
        run_dir.truncate_log(folder / run_dir.METRICS, state["written"]["metrics"])
    log(f"resuming from {path}")
    for name, (old, new) in changed_settings(json.loads(state["config"]), json.loads(to_json(config))).items():
        log(f"warning: {name} is {new}, but was {old} when the checkpoint was saved")
    return ResumePoint(path, state, appends_to_log)


def select_checkpoint(
    config: RunConfig, folder: Path, log: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint that `config.resume` selects and its content, or None if auto finds none.

    Raise InputError if a named checkpoint is unusable, or if nothing is left to train. Change nothing.
    """
    if config.resume == "auto":
        if run_dir.is_finished(folder, config.run_index, config.epochs):
            raise InputError(f"run in {folder}: finished, nothing to resume. Omit --resume.")
        latest = checkpointer.latest_valid(folder, benchmark=config.benchmark, log=log)
        if latest is None:
            return None
        path, state = latest[0].path, latest[1]
    else:
        path = Path(config.resume)
        state = checkpointer.load(path, benchmark=config.benchmark)
    check_usable(config, path, state)
    return path, state


def check_usable(config: RunConfig, path: Path, state: Mapping[str, Any]) -> None:
    """Raise InputError if the settings leave nothing to train after a checkpoint, or set another seed."""
    if state["evaluated"] and state["epoch"] >= config.epochs:
        raise InputError(f"{path}: all {config.epochs} epochs are complete. Pass more --epochs.")
    if config.seed not in (None, state["seed"]):
        raise InputError(f"--seed {config.seed}: {path} was trained with seed {state['seed']}. Omit --seed.")


def check_optimizer(
    config: RunConfig, path: Path, state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Raise InputError unless a checkpoint is of the settings' optimizer, with its parameter groups."""
    old_config = {"optimizer": "sgd", **json.loads(state["config"])}
    saved, expected = (
        f"{name} of {' + '.join(str(len(group['params'])) for group in param_groups)} parameters"
        for name, param_groups in (
            (old_config["optimizer"], state["optimizer"]["param_groups"]),
            (config.optimizer, groups),
        )
    )
    if saved == expected:
        return
    changed = changed_settings(old_config, json.loads(to_json(config)))
    settings = ", ".join(f"{name} {old}" for name, (old, _) in changed.items() if name in OPTIMIZER_SETTINGS)
    raise InputError(
        f"{path}: checkpoint of another optimizer, {saved} instead of {expected}. "
        f"Set {settings or 'all settings'} as in the run that wrote it."
    )


def check_categories(config: RunConfig, path: Path, state: Mapping[str, Any]) -> None:
    """Raise InputError unless a checkpoint has the categories of the annotations in their order."""
    theirs = [category["name"] for category in state.get("categories", ())]
    ours = [category.name for category in num_classes.read_categories(config)] if theirs else []
    if ours and theirs != ours:
        raise InputError(
            f"{path}: was trained on the categories {', '.join(theirs)}, but the annotations have {', '.join(ours)}. "
            "Restore the annotations. To start a new run from a checkpoint, pass it to --weights."
        )


def archive_logs(folder: Path, run_index: int) -> None:
    """Archive the logs of a run that saved no checkpoint."""
    for path in (run_dir.log_path(folder, run_index), folder / run_dir.METRICS):
        run_dir.truncate_log(path, 0)
        path.unlink(missing_ok=True)


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, as (old, new) by name."""
    names = [name for name in new if name not in MUTABLE_SETTINGS | {"seed"}]
    return {name: (old.get(name), new[name]) for name in names if old.get(name) != new[name]}
