"""ImageNet weights of a network's backbone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from detection.checkpoint import tensor_file
from detection.checkpoint.backbone_urls import fetch_command
from detection.checkpoint.weights import find_network
from detection.config.settings import InputError


def load(backbone: nn.Module, name: str, path: Path) -> None:
    """Load ImageNet weights with torchvision's names into a backbone, the ResNet `name`.

    Ignore tensors that the backbone does not have, such as the classifier. Raise InputError if the file is missing,
    truncated or from a different network.
    """
    content = tensor_file.read(path, hint=fetch_hint(name))
    load_into(find_network(content, path, "a ResNet", ["conv1.weight"])[1], backbone, name, path)


def fetch_hint(name: str) -> str:
    """Return the last sentence of an error message: how to get the right file."""
    return f"Fetch the weights of {name} with {fetch_command(name)}."


def load_into(weights: Mapping[str, Any], backbone: nn.Module, name: str, path: Path) -> None:
    """Load tensors with torchvision's names, read from `path`, into a backbone. Raise InputError if they do not fit."""
    expected = backbone.state_dict()
    missing = [tensor for tensor in expected if tensor not in weights and not tensor.endswith("num_batches_tracked")]
    if missing:
        raise InputError(
            f"{path}: not the weights of this ResNet, {len(missing)} tensors are missing "
            f"(first: {missing[0]}). {fetch_hint(name)}"
        )
    for key, tensor in expected.items():
        if key in weights and weights[key].shape != tensor.shape:
            raise InputError(
                f"{path}: not the weights of this ResNet, {key} has shape "
                f"{tuple(weights[key].shape)} instead of {tuple(tensor.shape)}. {fetch_hint(name)}"
            )
    backbone.load_state_dict({key: weights.get(key, tensor) for key, tensor in expected.items()})
