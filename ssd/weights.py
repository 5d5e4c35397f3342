"""Weights of the whole network, from checkpoints of this program, the MLPerf reference and the public SSD300 v1.1."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from detection.checkpoint import weights as files
from detection.checkpoint.weights import THIS_PROGRAM, Weights
from detection.config.settings import InputError
from ssd import checkpoint_names
from ssd.anchors import ANCHORS_PER_CELL
from ssd.config import Config
from ssd.model import SSD300

# Origin and prefix table of a file, by the prefix of its backbone's tensor names.
ORIGINS = {
    "model.layer": ("the MLPerf reference", checkpoint_names.MLPERF_PREFIXES),
    "feature_extractor.": ("SSD300 v1.1", checkpoint_names.SSD_V1_1_PREFIXES),
}

# Backbone by (blocks are bottlenecks, number of blocks in layer3).
BACKBONES = {
    (False, 2): "resnet18",
    (False, 6): "resnet34",
    (True, 6): "resnet50",
    (True, 23): "resnet101",
    (True, 36): "resnet152",
}


@dataclass(frozen=True)
class NetworkInfo:
    """Network of a state dict with our names. An unknown backbone is an empty string."""

    name: str
    backbone: str
    num_classes: int

    def __str__(self) -> str:
        return f"{self.name} on {self.backbone or 'an unknown backbone'} for {self.num_classes} classes"


def read(path: Path) -> Weights:
    """Read a checkpoint of any of the three origins. Raise InputError if it is not one, is damaged, or holds code."""
    content = files.read(path, hint="Name a checkpoint.")
    state = files.model_state(content, path)
    if any(name.startswith("backbone.") for name in state):
        return files.from_run_checkpoint(content, state)
    for prefix, (origin, prefixes) in ORIGINS.items():
        if any(name.startswith(prefix) for name in state):
            try:
                return Weights(checkpoint_names.from_reference(state, prefixes), origin)
            except KeyError as error:
                raise InputError(
                    f"{path}: looks like a checkpoint of {origin}, but the tensor {error} is missing or unknown. "
                    "Use an unmodified checkpoint."
                ) from error
            except RuntimeError as error:
                raise InputError(
                    f"{path}: the heads of this checkpoint of {origin} do not fit SSD300 ({error}). Use an "
                    "unmodified checkpoint."
                ) from error
    first = next(iter(state), "missing")
    raise InputError(
        f"{path}: not the weights of an SSD300 (the first tensor is {first}). Pass a checkpoint of {THIS_PROGRAM}, the "
        "MLPerf reference or SSD300 v1.1 to --weights, and weights of a backbone to --pretrained-backbone."
    )


def infer_network(state: Mapping[str, Tensor]) -> NetworkInfo:
    """Infer the network from a state dict with our names."""
    blocks = {match[1] for name in state if (match := re.match(r"backbone\.layer3\.(\d+)\.", name))}
    bottlenecks = "backbone.layer1.0.conv3.weight" in state
    head = state.get("heads.0.bias", torch.zeros(0))
    return NetworkInfo(
        name="ssd300-r50" if "extras.0.bn1.weight" in state else "ssd300-r34",
        backbone=BACKBONES.get((bottlenecks, len(blocks)), ""),
        num_classes=len(head) // 4 - 4,
    )


def check_compatible(weights: Weights, expected: Mapping[str, Tensor], path: Path) -> None:
    """Raise InputError if the weights do not fit the network with the state dict `expected`."""
    theirs, ours = infer_network(weights.state), infer_network(expected)
    if theirs != ours:
        raise InputError(
            f"{path}: holds {theirs}, but the settings ask for {ours}. "
            f"Pass --network {theirs.name} --backbone {theirs.backbone or 'auto'} --num-classes {theirs.num_classes}, "
            "or name another file."
        )
    files.check_compatible(weights.state, expected, str(ours), path)


def load(model: SSD300, path: Path, config: Config | None = None) -> Weights:
    """Load a checkpoint into the network, on the CPU. Raise InputError if it does not fit.

    config: the class outputs take the order of the categories in its annotations.
    """
    weights = read(path)
    check_compatible(weights, model.state_dict(), path)
    files.load_into(order_classes(weights, config, path) if config else weights, model)
    return weights


def order_classes(weights: Weights, config: Config, path: Path) -> Weights:
    """Return the weights with the class outputs in the order of the annotations. Raise InputError if the names differ.

    The weights must fit the network of the settings.
    """
    order = files.class_order(weights, config, path)
    state = dict(weights.state)
    outputs = [0, 1, 2, 3, *(4 + label for label in order)]
    for level, num_anchors in enumerate(ANCHORS_PER_CELL):
        files.keep_outputs(state, [f"heads.{level}"], num_groups=num_anchors, num_outputs=len(outputs), kept=outputs)
    return replace(weights, state=state)


def load_into(weights: Weights, model: SSD300, path: Path) -> None:
    """Load weights read from `path` into the network, on the CPU. Raise InputError if they do not fit."""
    check_compatible(weights, model.state_dict(), path)
    files.load_into(weights, model)
