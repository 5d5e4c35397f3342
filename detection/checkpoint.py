"""Checkpoints: what training has reached, written so that a file is whole or not there."""

import os
import random
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detection.config import InputError
from detection.device import random_state, set_random_state
from detection.run_folder import CHECKPOINTS, Saved, checkpoint_name, checkpoints

FORMAT = 2


def save(folder: Path, *, epoch: int, step: int, score: float | None, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint of a run's folder; of the older ones keep the one before it and the best.

    The file is written to the side, synced and renamed, so that a crash leaves no torn one behind. Raises OSError
    where there is no room, and leaves the others as they were.
    """
    path = folder / CHECKPOINTS / checkpoint_name(epoch, step, score)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        sync(path.parent)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):  # torch's archive writer words a full disk so
            raise OSError(str(error).splitlines()[0]) from error
        raise
    prune(folder, keep=path)
    return path


def sync(folder: Path) -> None:
    """Make the names in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(folder: Path, keep: Path) -> None:
    """Remove all checkpoints of a run's folder but one, the one before it, and the best."""
    others = [saved for saved in checkpoints(folder) if saved.path != keep]
    best = max((saved for saved in checkpoints(folder) if saved.evaluated), key=lambda s: s.score, default=None)
    for saved in others[:-1]:
        if saved != best:
            saved.path.unlink(missing_ok=True)


def load(path: Path, *, benchmark: str) -> dict[str, Any]:
    """Read a checkpoint of this benchmark to the CPU, without running code that it might hold.

    Raises InputError that names a file that is torn, damaged, or something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise InputError(f"{path}: the checkpoint is damaged (in {damaged})")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile:
        raise InputError(f"{path}: the checkpoint is cut off or damaged, or it is none") from None
    except OSError as error:
        raise InputError(f"{path}: the checkpoint cannot be read ({error.strerror})") from error
    except Exception as error:  # whatever the unpickler stumbles over
        raise InputError(f"{path}: this is no checkpoint ({str(error).splitlines()[0]})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path}: this is no checkpoint of this program")
    if state["benchmark"] != benchmark:
        raise InputError(f"{path}: this is a checkpoint of {state['benchmark']}, not of {benchmark}")
    return state


def newest(folder: Path, *, benchmark: str, say: Callable[[str], None]) -> tuple[Saved, dict[str, Any]] | None:
    """The newest checkpoint of a run's folder that is sound; says which ones are not."""
    for saved in reversed(checkpoints(folder)):
        try:
            return saved, load(saved.path, benchmark=benchmark)
        except InputError as error:
            say(f"warning: {error}; an older one is tried")
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
