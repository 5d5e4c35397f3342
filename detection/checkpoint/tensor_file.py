"""Files of tensors by name, read without executing pickled code."""

import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detection.config.settings import InputError
from detection.data.file_content import CONTENT_HEAD, describe_other_content

SAFETENSORS = ".safetensors"

# Entries of a file that hold the tensors of a network, in order of preference. Others nest them, such as ema in module.
STATE_ENTRIES = ("model", "state_dict", "model_state_dict", "ema", "model_ema", "module")
NUM_LISTED_ENTRIES = 6


def read(path: Path, *, kind: str = "weights file", hint: str) -> dict[str, Any]:
    """Read a .npz file, a .safetensors file, or a file written by torch.save, to the CPU.

    Raise InputError if the file is missing, truncated, damaged, not a dictionary, or contains more than tensors and
    plain values. kind: name of such a file in the message. hint: last sentence of the message.
    """
    if path.suffix == SAFETENSORS and find_spec("safetensors") is None:
        raise InputError(
            f"{path}: requires the package safetensors. Install it with .venv/bin/pip install safetensors."
        )
    try:
        with path.open("rb") as file:
            file.read(1)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file. {hint}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). {hint}") from None
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise InputError(f"{path}: not a valid {kind} (its member {damaged} is damaged). {hint}")
        content = load(path)
    except InputError:
        raise
    except Exception as error:  # any error of torch, NumPy or safetensors, whose messages concern their own internals
        unpickled = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        reason = (
            f"it holds an object of {unpickled[1]}, and pickled code is never executed: save only tensors, as "
            "torch.save(model.state_dict(), FILE)"
            if unpickled
            else describe_format(path)
        )
        raise InputError(f"{path}: not a valid {kind} ({reason}). {hint}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: contains no dictionary of tensors, but a {type(content).__name__}. {hint}")
    return content


def load(path: Path) -> Any:
    """Load a file by its suffix. Any error can result from a damaged one."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    if path.suffix == SAFETENSORS:
        from safetensors.torch import load_file  # optional package

        return load_file(path)
    # Arguments of the command line, which training programs store in their checkpoints. They execute nothing.
    torch.serialization.add_safe_globals([Namespace])
    return torch.load(path, map_location="cpu", weights_only=True)


def describe_format(path: Path) -> str:
    """Describe a file that could not be read as tensors by what it starts with."""
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        members = {Path(name).name for name in archive.namelist()}
        if "constants.pkl" in members:
            return "a TorchScript program"
        return "damaged" if "data.pkl" in members else "an archive that was not written by torch.save"
    with path.open("rb") as file:
        start = file.read(CONTENT_HEAD)
    if start.startswith((b"PK", b"\x80")):
        return "damaged or truncated"
    if other := describe_other_content(start):
        return other
    if path.suffix == SAFETENSORS:
        return "damaged or truncated"
    return "text" if all(byte >= 32 or byte in b"\t\n\r" for byte in start) else "of an unknown format"


def find_state(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a network in the content of a file: the content itself, or one of its `STATE_ENTRIES`.

    Return no tensors if neither is a dictionary of tensors only.
    """
    if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        return dict(content)
    entries = [content[name] for name in STATE_ENTRIES if isinstance(content.get(name), Mapping)]
    return next(filter(None, map(find_state, entries)), {})


def describe_entries(content: Mapping[str, Any]) -> str:
    """Describe the content of a file: its first entries and their types."""
    entries = [f"{name} ({type(value).__name__})" for name, value in content.items()]
    more = [f"{len(entries) - NUM_LISTED_ENTRIES} more"] if len(entries) > NUM_LISTED_ENTRIES else []
    return ", ".join(entries[:NUM_LISTED_ENTRIES] + more) or "nothing"
