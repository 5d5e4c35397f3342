"""Checkpoints of the training state, written atomically."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detection import atomic_file
from detection.checkpoint import tensor_file
from detection.config.settings import InputError
from detection.run_dir import CHECKPOINTS, CheckpointFile, checkpoint_name, list_checkpoints
from detection.runtime.device import rng_state, set_rng_state

FORMAT = 2


def save(folder: Path, *, epoch: int, step: int, score: float | None, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint into a run folder. Keep also the previous one and the best one.

    The file is written under a temporary name, synced and renamed, so that a crash leaves no partial file. Raise
    OSError if the disk is full, and leave the other checkpoints untouched.
    """
    path = folder / CHECKPOINTS / checkpoint_name(epoch, step, score)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_file.atomic_write(path) as partial:
            with partial.open("wb") as file:
                torch.save({"format": FORMAT, **state}, file)
            atomic_file.fsync_path(partial)
        atomic_file.fsync_path(path.parent)
    except RuntimeError as error:  # torch's archive writer reports a full disk like this
        raise OSError(str(error).splitlines()[0]) from error
    prune(folder, keep=path)
    return path


def prune(folder: Path, keep: Path) -> None:
    """Remove all checkpoints of a run folder except `keep`, the one before it, and the best."""
    others = [saved for saved in list_checkpoints(folder) if saved.path != keep]
    best = max((saved for saved in list_checkpoints(folder) if saved.has_score), key=lambda s: s.score, default=None)
    for saved in others[:-1]:
        if saved != best:
            saved.path.unlink(missing_ok=True)


def load(path: Path, *, benchmark: str, hint: str = "Name another checkpoint.") -> dict[str, Any]:
    """Read a checkpoint of this benchmark to the CPU, without executing pickled code.

    Raise InputError, with `hint` as its last sentence, if the file is truncated, damaged, or not such a checkpoint.
    """
    state = tensor_file.read(path, kind="checkpoint", hint=hint)
    if state.get("format") != FORMAT:
        raise InputError(f"{path}: not a checkpoint of this program. {hint}")
    if state["benchmark"] != benchmark:
        raise InputError(f"{path}: checkpoint of {state['benchmark']}, not of {benchmark}. {hint}")
    return state


def latest_valid(
    folder: Path, *, benchmark: str, log: Callable[[str], None]
) -> tuple[CheckpointFile, dict[str, Any]] | None:
    """Return the latest valid checkpoint of a run folder. Warn about each damaged one."""
    for saved in reversed(list_checkpoints(folder)):
        try:
            return saved, load(saved.path, benchmark=benchmark, hint="Trying an older one.")
        except InputError as error:
            log(f"warning: {error}")
    return None


def rng_states(device: torch.device) -> dict[str, Any]:
    """Return the states of all random number generators of this process."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 (libraries may draw from it)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if (state := rng_state(device)) is not None:
        states["device"] = state
    return states


def set_rng_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Restore all random number generators."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if device.type != "cpu" and "device" in states:
        set_rng_state(states["device"], device)
