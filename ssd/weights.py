"""Weights of the whole network: our checkpoints, the MLPerf reference's and those of the public SSD300 v1.1."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from detection.checkpoint import weights as files
from detection.checkpoint.weights import OURS, Weights
from detection.config.settings import InputError
from ssd import checkpoint_names
from ssd.config import Config
from ssd.model import SSD300, make_model

# A file's origin, by what the names of its trunk's tensors start with; and its table of names.
ORIGINS = {
    "model.layer": ("the MLPerf reference", checkpoint_names.NAMES),
    "feature_extractor.": ("SSD300 v1.1", checkpoint_names.V1_1_NAMES),
}

# A trunk, by whether its blocks are bottlenecks and how many of them layer3 has.
TRUNKS = {
    (False, 2): "resnet18",
    (False, 6): "resnet34",
    (True, 6): "resnet50",
    (True, 23): "resnet101",
    (True, 36): "resnet152",
}


@dataclass(frozen=True)
class Network:
    """What a state dict, with our names, is of; a trunk that is none of those known is empty."""

    name: str
    trunk: str
    num_classes: int

    def __str__(self) -> str:
        return f"{self.name} on {self.trunk or 'an unknown trunk'} for {self.num_classes} classes"


def read(path: Path) -> Weights:
    """Read a checkpoint of any of the three; raises InputError where it is none, damaged, or holds code."""
    content = files.read(path, what_to_do="Name a checkpoint.")
    state = files.of_model(content, path)
    if any(name.startswith("backbone.") for name in state):
        return files.of_run(content, state)
    for start, (origin, names) in ORIGINS.items():
        if any(name.startswith(start) for name in state):
            try:
                return Weights(checkpoint_names.from_reference(state, names), origin)
            except KeyError as error:
                raise InputError(
                    f"{path}: looks like a checkpoint of {origin}, but for the tensor {error}, which is missing or "
                    "unknown there"
                ) from error
            except RuntimeError as error:
                raise InputError(
                    f"{path}: the heads of this checkpoint of {origin} are of no SSD300 ({error})"
                ) from error
    first = next(iter(state), "nothing at all")
    raise InputError(
        f"{path}: these are not the weights of an SSD300 (the first is {first}). --weights takes a checkpoint of "
        f"{OURS}, of the MLPerf reference or of SSD300 v1.1; weights of the trunk alone are for --pretrained-backbone."
    )


def network_of(state: Mapping[str, Tensor]) -> Network:
    """The network that a state dict, with our names, is of."""
    blocks = {match[1] for name in state if (match := re.match(r"backbone\.layer3\.(\d+)\.", name))}
    bottlenecks = "backbone.layer1.0.conv3.weight" in state
    head = state.get("heads.0.bias", torch.zeros(0))
    return Network(
        name="ssd300-r50" if "extras.0.bn1.weight" in state else "ssd300-r34",
        trunk=TRUNKS.get((bottlenecks, len(blocks)), ""),
        num_classes=len(head) // 4 - 4,
    )


def wanted(config: Config) -> dict[str, Tensor]:
    """The state dict of the network of the settings, without memory behind it."""
    with torch.device("meta"):
        return make_model(config).state_dict()


def check(weights: Weights, wanted: Mapping[str, Tensor], path: Path) -> None:
    """Raise InputError where the weights are not of the network with the state dict `wanted`."""
    theirs, ours = network_of(weights.state), network_of(wanted)
    if theirs != ours:
        raise InputError(
            f"{path} holds {theirs}, and the settings ask for {ours}. "
            f"Pass --network {theirs.name} --backbone {theirs.trunk or 'auto'} --num-classes {theirs.num_classes}, or "
            "another --weights"
        )
    files.check(weights.state, wanted, str(ours), path)


def load(model: SSD300, path: Path) -> Weights:
    """Load a file into the network, on the CPU; raises InputError where it is of another one, or unfit."""
    weights = read(path)
    put(weights, model, path)
    return weights


def put(weights: Weights, model: SSD300, path: Path) -> None:
    """Put what was read of a file into the network, on the CPU; raises InputError where it is of another one."""
    check(weights, model.state_dict(), path)
    files.put(weights, model)
