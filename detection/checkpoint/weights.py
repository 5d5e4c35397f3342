"""Weights files: tensors by name, read without executing pickled code."""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from detection.config.run_config import RunConfig
from detection.config.settings import InputError
from detection.data import num_classes
from detection.data.coco import Category
from detection.runtime import sync_batch_norm

THIS_PROGRAM = "this program"

Config = TypeVar("Config", bound=RunConfig)
RenamePatterns = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
"""Regular expressions of tensor names, each with its replacement, as for `re.sub`."""


@dataclass(frozen=True)
class Weights:
    """Weights of a network, read from a file.

    state: tensors by the names of this program. origin: program that wrote the file. statistics: batch-norm running
    statistics (S,), if stored separately. settings, categories: of the run that wrote the file, if by this program.
    """

    state: Mapping[str, Tensor]
    origin: str
    statistics: Tensor | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    categories: tuple[Category, ...] = ()


def read(path: Path, *, kind: str = "weights file", hint: str) -> dict[str, Any]:
    """Read a .npz file, or a file written by torch.save, to the CPU.

    Raise InputError if the file is missing, truncated, damaged, not a dictionary, or contains more than tensors and
    plain values. kind: name of such a file in the message. hint: last sentence of the message.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(f"its member {damaged} is damaged")
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file. {hint}") from None
    except pickle.UnpicklingError as error:  # torch's own message refers to an argument of torch.load
        raise InputError(
            f"{path}: not a valid {kind} (not written by torch.save, or it contains more than tensors; pickled code "
            f"is never executed). {hint}"
        ) from error
    except Exception as error:  # any error of zipfile or torch in a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a valid {kind} ({reason}). {hint}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: contains no dictionary of tensors. {hint}")
    return content


def model_state(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the model's tensors in the content of a file: its entry "model", or the content itself.

    Remove the prefix that a DistributedDataParallel model adds to each name. Raise InputError if an entry is not a
    tensor.
    """
    state = content.get("model", content)
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"{path}: contains no dictionary of tensors, at the top level or under the key model")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def from_run_checkpoint(content: Mapping[str, Any], state: Mapping[str, Tensor]) -> Weights:
    """Return the weights in a checkpoint of this program. state: the model's tensors in it."""
    rows = content.get("batch_norm")
    statistics = rows.mean(dim=0) if isinstance(rows, Tensor) else None  # each rank has its own within an epoch
    categories = tuple(Category(**category) for category in content.get("categories", ()))
    return Weights(state, THIS_PROGRAM, statistics, json.loads(content.get("config", "{}")), categories)


def class_order(weights: Weights, config: RunConfig, path: Path) -> list[int]:
    """Return the label in the file of each label (K,) of the data, background 0 first.

    Categories are matched by name. It is the identity if the file has no names, or if the run reads no data. Raise
    InputError if the names differ.
    """
    theirs = [category.name for category in weights.categories]
    ours = [category.name for category in num_classes.read_categories(config)] if theirs else []
    if theirs == ours or not ours:
        return list(range(config.num_classes))
    if sorted(theirs) != sorted(ours) or len(set(ours)) < len(ours):
        raise InputError(
            f"{path}: was trained on the categories {', '.join(theirs)}, but the annotations have {', '.join(ours)}. "
            "Use annotations with the same names, or name another file."
        )
    return [0, *(1 + theirs.index(name) for name in ours)]


def keep_outputs(
    state: dict[str, Tensor], layers: Iterable[str], *, num_groups: int, num_outputs: int, kept: Sequence[int]
) -> None:
    """Reduce or reorder, in place, the outputs of layers to those `kept`: their weights and biases.

    The channels of a layer are `num_groups` groups of `num_outputs` blocks, such as a block per class for each anchor.
    """
    for layer in layers:
        for name in (f"{layer}.weight", f"{layer}.bias"):
            state[name] = state[name].unflatten(0, (num_groups, num_outputs, -1))[:, kept].flatten(0, 2)


def rename(state: Mapping[str, Tensor], patterns: RenamePatterns) -> dict[str, Tensor]:
    """Rename tensors by regular expressions, one after the other."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def expected_state(make_model: Callable[[Config], nn.Module], config: Config) -> dict[str, Tensor]:
    """Return the state dict of the settings' network on the meta device, without storage."""
    with torch.device("meta"):
        return make_model(config).state_dict()


def load_into(weights: Weights, model: nn.Module) -> None:
    """Load weights that `check_compatible` accepted into a model on the CPU."""
    model.load_state_dict({name: weights.state.get(name, tensor) for name, tensor in model.state_dict().items()})
    if weights.statistics is not None:
        sync_batch_norm.set_running_stats(model, weights.statistics)


def check_compatible(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], network: str, path: Path) -> None:
    """Raise InputError unless the tensors read from `path` have the `expected` names and shapes of a network."""
    # Older files lack the counter of batch norm.
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in expected]
    mismatched = [
        f"{name}, {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        for name, tensor in state.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    for problem, names in (("missing", missing), ("unexpected", unexpected), ("mismatched", mismatched)):
        if names:
            raise InputError(f"{path}: {len(names)} {problem} tensors for {network} (first: {names[0]})")
