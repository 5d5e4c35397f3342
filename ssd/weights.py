"""Weights of the whole network, from checkpoints of this program, the MLPerf reference and the public SSD300 v1.1."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from detection.checkpoint import class_outputs, tensor_file
from detection.checkpoint import weights as files
from detection.checkpoint.class_outputs import ClassLayer
from detection.checkpoint.weights import Weights
from detection.config.settings import InputError
from ssd import checkpoint_names
from ssd.anchors import ANCHORS_PER_CELL
from ssd.config import Config
from ssd.model import SSD300, make_model

CLASS_LAYERS = tuple(
    ClassLayer(f"heads.{level}", num_groups=num_anchors, num_shared=4)
    for level, num_anchors in enumerate(ANCHORS_PER_CELL)
)

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
    content = tensor_file.read(path, hint="Name a checkpoint.")
    marker, state = files.find_network(content, path, "an SSD300", ("heads.0.bias", "loc.0.bias"))
    if marker == "heads.0.bias":
        return files.from_run_checkpoint(content, state)
    is_v1_1 = any(name.startswith("feature_extractor.") for name in state)
    origin = "SSD300 v1.1" if is_v1_1 else "the MLPerf reference"
    prefixes = checkpoint_names.SSD_V1_1_PREFIXES if is_v1_1 else checkpoint_names.MLPERF_PREFIXES
    try:
        return Weights(checkpoint_names.from_reference(state, prefixes), origin)
    except KeyError as error:
        raise InputError(
            f"{path}: looks like a checkpoint of {origin}, but the tensor {error} is missing or unknown. "
            "Use an unmodified checkpoint."
        ) from error
    except (RuntimeError, IndexError) as error:
        raise InputError(
            f"{path}: the heads of this checkpoint of {origin} do not fit SSD300 ({error}). Use an "
            "unmodified checkpoint."
        ) from error


def infer_network(state: Mapping[str, Tensor]) -> NetworkInfo:
    """Infer the network from a state dict with our names."""
    blocks = {match[1] for name in state if (match := re.match(r"backbone\.layer3\.(\d+)\.", name))}
    bottlenecks = "backbone.layer1.0.conv3.weight" in state
    return NetworkInfo(
        name="ssd300-r50" if "extras.0.bn1.weight" in state else "ssd300-r34",
        backbone=BACKBONES.get((bottlenecks, len(blocks)), ""),
        num_classes=class_outputs.count_classes(state, CLASS_LAYERS[0]),
    )


def check_compatible(weights: Weights, config: Config, path: Path) -> None:
    """Raise InputError unless the weights fit the network of the settings, apart from its number of classes."""
    theirs = infer_network(weights.state)
    if (theirs.name, theirs.backbone) != (config.network, config.backbone_name):
        raise InputError(
            f"{path}: holds {theirs}, but the settings ask for {config.network} on {config.backbone_name}. "
            f"Pass --network {theirs.name} --backbone {theirs.backbone or 'auto'}, or name another file."
        )
    class_outputs.check_compatible(weights, CLASS_LAYERS, make_model, config, path)


def load(model: SSD300, config: Config, path: Path) -> Weights:
    """Load a checkpoint into the network, on the CPU. Raise InputError if it does not fit (`class_outputs.load`)."""
    weights = read(path)
    check_compatible(weights, config, path)
    return class_outputs.load(weights, CLASS_LAYERS, model, config, path)


def load_into(weights: Weights, model: SSD300, config: Config, path: Path) -> None:
    """Load weights read from `path` into the network, on the CPU. Raise InputError if they do not fit."""
    check_compatible(weights, config, path)
    files.load_into(weights, model)
