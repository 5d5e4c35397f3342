"""Files of weights: tensors by name, read without running any code that a file might hold."""

import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detection.config.settings import InputError
from detection.data.coco import Category
from detection.runtime import sync_batch_norm

OURS = "this program"


@dataclass(frozen=True)
class Weights:
    """What a file holds of a network. state: under our names. origin: whose checkpoint it is.

    statistics: of batch norm (S,), where they are told apart. settings, categories: of the run that wrote it, where
    that was one of ours.
    """

    state: Mapping[str, Tensor]
    origin: str
    statistics: Tensor | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    categories: tuple[Category, ...] = ()


def read(path: Path, *, what: str = "file of weights", what_to_do: str) -> dict[str, Any]:
    """The content of a .npz file, or of one that torch.save has written, on the CPU.

    what: the name of such a file, and what_to_do: a sentence, for the message. Raises InputError where the file is
    absent, cut off, damaged, holds more than tensors and plain values, or no table of them.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(f"its part {damaged} is damaged")
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file. {what_to_do}") from None
    except pickle.UnpicklingError as error:  # whose own words are about a setting of torch's
        raise InputError(
            f"{path}: not a whole {what} (torch.save did not write it, or it holds more than tensors; code in "
            f"it is never run). {what_to_do}"
        ) from error
    except Exception as error:  # whatever zipfile or torch stumbles over in a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a whole {what} ({reason}). {what_to_do}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no table of weights. {what_to_do}")
    return content


def of_model(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of the model in what `read` gave: under "model" beside others, or by themselves.

    The prefix that a model wrapped for several ranks adds to each name is taken away. Raises InputError where there
    is something else among them.
    """
    table = content.get("model", content)
    if not isinstance(table, Mapping) or not all(isinstance(tensor, Tensor) for tensor in table.values()):
        raise InputError(f"{path}: holds no table of weights, by itself or under the name model")
    return {name.removeprefix("module."): tensor for name, tensor in table.items()}


def of_run(content: Mapping[str, Any], state: Mapping[str, Tensor]) -> Weights:
    """What `read` gave of a checkpoint of a run, `state` the tensors of the model in it."""
    rows = content.get("batch_norm")
    statistics = rows.mean(dim=0) if isinstance(rows, Tensor) else None  # of each rank, in the midst of an epoch
    categories = tuple(Category(**category) for category in content.get("categories", ()))
    return Weights(state, OURS, statistics, json.loads(content.get("config", "{}")), categories)


def put(weights: Weights, model: nn.Module) -> None:
    """Put weights that `check` has let pass into their network, on the CPU."""
    model.load_state_dict({name: weights.state.get(name, tensor) for name, tensor in model.state_dict().items()})
    if weights.statistics is not None:
        sync_batch_norm.set_statistics(model, weights.statistics)


def check(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str, path: Path) -> None:
    """Raise InputError where tensors read from `path` are not those of the network `what`, whose own are `wanted`."""
    # Files older than the counter of batch norm lack it.
    absent = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in wanted]
    shapes = [
        f"{name}, which is {tuple(tensor.shape)} and not {tuple(wanted[name].shape)}"
        for name, tensor in state.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    for how, names in (("lacks", absent), ("does not know", unknown), ("has another shape of", shapes)):
        if names:
            raise InputError(f"{path}: the {what} in it {how} {len(names)} tensors (first: {names[0]})")
