"""ImageNet weights for a network's trunk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from detection.checkpoint.backbone_urls import how_to_fetch
from detection.checkpoint.weights import read
from detection.config.settings import InputError


def load(trunk: nn.Module, name: str, path: Path) -> None:
    """Load torchvision's ImageNet weights (.pth, or .npz of the same names) into a trunk, the ResNet `name`.

    What the trunk does not have, such as the classifier, is left out. InputError tells of a file that is absent,
    truncated or of another network.
    """
    put(read(path, what_to_do=what_to_do(name)), trunk, name, path)


def what_to_do(name: str) -> str:
    """How to get the right file: the end of a message."""
    return f"Fetch those of {name} with {how_to_fetch(name)}."


def put(weights: Mapping[str, Any], trunk: nn.Module, name: str, path: Path) -> None:
    """Put tensors of torchvision's names, read from `path`, into a trunk; raises InputError where they do not fit."""
    wanted = trunk.state_dict()
    absent = [tensor for tensor in wanted if tensor not in weights and not tensor.endswith("num_batches_tracked")]
    if absent:
        raise InputError(
            f"{path}: these are not the weights of this ResNet, {len(absent)} tensors are missing "
            f"(first: {absent[0]}). {what_to_do(name)}"
        )
    for key, tensor in wanted.items():
        if key in weights and weights[key].shape != tensor.shape:
            raise InputError(
                f"{path}: these are not the weights of this ResNet, {key} has the shape "
                f"{tuple(weights[key].shape)} instead of {tuple(tensor.shape)}. {what_to_do(name)}"
            )
    trunk.load_state_dict({key: weights.get(key, tensor) for key, tensor in wanted.items()})
