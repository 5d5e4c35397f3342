"""Going on with a run that broke off."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detection import run_dir
from detection.checkpoint import checkpointer
from detection.config.run_config import RunConfig
from detection.config.settings import InputError, to_json

# Settings that may change from start to start of one run: they say nothing about what is trained.
INCIDENTAL = {
    "resume", "run_dir", "log_dir", "max_steps", "log_every", "num_workers", "checkpoint_every", "experiment",
    "checkpoint", "eval_before_training", "summary", "tensorboard",
}  # fmt: skip


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run goes on from.

    continues: the run's own log goes on, cut to what it held then; else the checkpoint is another run's, and a new
    log begins.
    """

    path: Path
    state: Mapping[str, Any]
    continues: bool


def find(config: RunConfig, folder: Path, say: Callable[[str], None] = print) -> Resumed | None:
    """The checkpoint to go on from, as `config.resume` says, and the logs of the folder cut to it.

    None where a run is to begin anew. Raises InputError where a checkpoint that was named is of no use.
    """
    if config.resume == "none":
        return None
    if config.resume == "auto":
        if run_dir.is_finished(folder, config.run_index, config.epochs):
            raise InputError(f"the run in {folder} is finished: there is nothing to resume. Leave --resume out.")
        newest = checkpointer.newest(folder, benchmark=config.benchmark, say=say)
        if newest is None:
            say(f"there is nothing to resume in {folder}: the run begins anew")
            clear(folder, config.run_index)
            return None
        path, state = newest[0].path, newest[1]
    else:
        path = Path(config.resume)
        state = checkpointer.load(path, benchmark=config.benchmark)
        if state["evaluated"] and state["epoch"] >= config.epochs:
            raise InputError(f"{path} has all {config.epochs} epochs behind it. Pass more --epochs.")
    continues = path.resolve().parent.parent == folder.resolve()
    if continues:
        run_dir.cut(run_dir.log_file(folder, config.run_index), state["written"]["log"])
        run_dir.cut(folder / run_dir.METRICS, state["written"]["metrics"])
    say(f"resuming from {path}")
    for name, (old, new) in changes(json.loads(state["config"]), json.loads(to_json(config))).items():
        say(f"warning: {name} is {new}, and was {old} when that was saved")
    if config.seed not in (None, state["seed"]):
        raise InputError(f"--seed {config.seed}: {path} was trained with seed {state['seed']}. Leave it out.")
    return Resumed(path, state, continues)


def clear(folder: Path, experiment: int) -> None:
    """Put the logs of a run that left no checkpoint out of the way."""
    for path in (run_dir.log_file(folder, experiment), folder / run_dir.METRICS):
        run_dir.cut(path, 0)
        path.unlink(missing_ok=True)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that were changed since, (before, now) by name."""
    names = [name for name in new if name not in INCIDENTAL | {"seed"}]
    return {name: (old.get(name), new[name]) for name in names if old.get(name) != new[name]}
