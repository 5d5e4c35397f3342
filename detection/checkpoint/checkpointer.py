"""Checkpoints: what training has reached, written so that a file is whole or not there."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detection import atomic_file
from detection.checkpoint import weights
from detection.config.settings import InputError
from detection.run_dir import CHECKPOINTS, Saved, checkpoint_name, checkpoints
from detection.runtime.device import random_state, set_random_state

FORMAT = 2


def save(folder: Path, *, epoch: int, step: int, score: float | None, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint of a run's folder; of the older ones keep the one before it and the best.

    The file is written to the side, synced and renamed, so that a crash leaves no torn one behind. Raises OSError
    where there is no room, and leaves the others as they were.
    """
    path = folder / CHECKPOINTS / checkpoint_name(epoch, step, score)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_file.writing(path) as partial:
            with partial.open("wb") as file:
                torch.save({"format": FORMAT, **state}, file)
            atomic_file.sync(partial)
        atomic_file.sync(path.parent)
    except RuntimeError as error:  # torch's archive writer words a full disk so
        raise OSError(str(error).splitlines()[0]) from error
    prune(folder, keep=path)
    return path


def prune(folder: Path, keep: Path) -> None:
    """Remove all checkpoints of a run's folder but one, the one before it, and the best."""
    others = [saved for saved in checkpoints(folder) if saved.path != keep]
    best = max((saved for saved in checkpoints(folder) if saved.evaluated), key=lambda s: s.score, default=None)
    for saved in others[:-1]:
        if saved != best:
            saved.path.unlink(missing_ok=True)


def load(path: Path, *, benchmark: str, what_to_do: str = "Name another one.") -> dict[str, Any]:
    """Read a checkpoint of this benchmark to the CPU, without running code that it might hold.

    what_to_do: the end of the message, a sentence. Raises InputError that names a file that is torn, damaged, or
    something else.
    """
    state = weights.read(path, what="checkpoint", what_to_do=what_to_do)
    if state.get("format") != FORMAT:
        raise InputError(f"{path}: this is no checkpoint of this program. {what_to_do}")
    if state["benchmark"] != benchmark:
        raise InputError(f"{path}: this is a checkpoint of {state['benchmark']}, not of {benchmark}. {what_to_do}")
    return state


def newest(folder: Path, *, benchmark: str, say: Callable[[str], None]) -> tuple[Saved, dict[str, Any]] | None:
    """The newest checkpoint of a run's folder that is sound; says which ones are not."""
    for saved in reversed(checkpoints(folder)):
        try:
            return saved, load(saved.path, benchmark=benchmark, what_to_do="An older one is tried.")
        except InputError as error:
            say(f"warning: {error}")
    return None


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of all generators of random numbers of this process."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 (whatever may draw from it)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if (state := random_state(device)) is not None:
        states["device"] = state
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Put all generators of random numbers back to where they were."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if device.type != "cpu" and "device" in states:
        set_random_state(states["device"], device)
