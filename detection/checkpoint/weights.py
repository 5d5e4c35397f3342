"""Weights of whole networks: their tensors in the layouts of several programs, and their names."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from detection.checkpoint import tensor_file
from detection.config.run_config import RunConfig
from detection.config.settings import InputError
from detection.data.coco import Category
from detection.runtime import sync_batch_norm

THIS_PROGRAM = "this program"

Config = TypeVar("Config", bound=RunConfig)
RenamePatterns = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]
"""Regular expressions of tensor names, each with its replacement, as for `re.sub`."""

WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of a name that torch.compile, FSDP and activation checkpointing insert anywhere."""


@dataclass(frozen=True)
class Weights:
    """Weights of a network, read from a file.

    state: tensors by the names of this program. origin: program that wrote the file. statistics: batch-norm running
    statistics (S,), if stored separately. settings, categories: of the run that wrote the file, if known. report: which
    tensors a network took.
    """

    state: Mapping[str, Tensor]
    origin: str
    statistics: Tensor | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    categories: tuple[Category, ...] = ()
    report: str = ""


def find_network(
    content: Mapping[str, Any], path: Path, network: str, markers: Sequence[str]
) -> tuple[str, dict[str, Tensor]]:
    """Return the first of `markers`, names of tensors, that a file has, and the tensors of the network with it.

    They are in the content of the file or in an entry (`tensor_file.find_state`). The prefix before the marker's name,
    such as "module." or "model.", is removed. Tensors without it, such as those of a loss, are ignored. Raise
    InputError if the file has none of them. network: its name in the message.
    """
    state = {WRAPPERS.sub("", name): tensor for name, tensor in tensor_file.find_state(content).items()}
    if not state:
        raise InputError(
            f"{path}: contains no dictionary of tensors, but {tensor_file.describe_entries(content)}. Name a file with "
            f"tensors at the top level or under one of the keys {', '.join(tensor_file.STATE_ENTRIES)}."
        )
    for marker in markers:
        prefixes = [name.removesuffix(marker) for name in state if f".{name}".endswith(f".{marker}")]
        if prefixes:
            prefix = min(prefixes, key=len)
            tensors = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            return marker, tensors
    raise InputError(
        f"{path}: not the weights of {network} (the first tensor is {next(iter(state))}). Pass weights of the whole "
        "network to --weights, and those of a backbone to --pretrained-backbone."
    )


def from_run_checkpoint(content: Mapping[str, Any], state: Mapping[str, Tensor]) -> Weights:
    """Return the weights with our tensor names in the content of a file, with the run's metadata if it holds any."""
    if not isinstance(content.get("benchmark"), str):
        return Weights(state, THIS_PROGRAM)
    rows = content.get("batch_norm")
    statistics = rows.mean(dim=0) if isinstance(rows, Tensor) else None  # each rank has its own within an epoch
    categories = tuple(Category(**category) for category in content.get("categories", ()))
    return Weights(state, THIS_PROGRAM, statistics, json.loads(content.get("config", "{}")), categories)


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
