"""ImageNet weights for the trunk."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detection.config import InputError
from ssd.model import Backbone

WHAT_TO_DO = "Fetch it with ./get_resnet34_backbone.sh."


def load(backbone: Backbone, path: Path) -> None:
    """Load torchvision's ImageNet weights (.pth, or .npz of the same names) into the trunk.

    What belongs to layer4 and the classifier is left out. InputError tells of a file that is absent, truncated
    or of another network.
    """
    weights = read(path)
    wanted = backbone.state_dict()
    absent = [name for name in wanted if name not in weights and not name.endswith("num_batches_tracked")]
    if absent:
        raise InputError(
            f"{path}: these are not the weights of this ResNet, {len(absent)} tensors are missing "
            f"(first: {absent[0]}). {WHAT_TO_DO}"
        )
    for name, tensor in wanted.items():
        if name in weights and weights[name].shape != tensor.shape:
            raise InputError(
                f"{path}: these are not the weights of this ResNet, {name} has the shape "
                f"{tuple(weights[name].shape)} instead of {tuple(tensor.shape)}. {WHAT_TO_DO}"
            )
    backbone.load_state_dict({name: weights.get(name, tensor) for name, tensor in wanted.items()})


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth or .npz file; code in it is never run."""
    try:
        if path.suffix == ".npz":
            with np.load(path) as archive:
                return {name: torch.from_numpy(archive[name]) for name in archive.files}
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file. {WHAT_TO_DO}") from None
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a whole file of weights ({reason}). {WHAT_TO_DO}") from error
    if not isinstance(weights, dict):
        raise InputError(f"{path}: holds no table of weights. {WHAT_TO_DO}")
    return weights
