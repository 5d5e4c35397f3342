"""ImageNet weights for the trunk."""

from pathlib import Path

from detection.config import InputError
from detection.weights import read
from ssd.config import how_to_fetch
from ssd.model import Backbone


def load(backbone: Backbone, path: Path) -> None:
    """Load torchvision's ImageNet weights (.pth, or .npz of the same names) into the trunk.

    What belongs to layer4 and the classifier is left out. InputError tells of a file that is absent, truncated
    or of another network.
    """
    what_to_do = f"Fetch those of {backbone.name} with {how_to_fetch(backbone.name)}."
    weights = read(path, what_to_do=what_to_do)
    wanted = backbone.state_dict()
    absent = [name for name in wanted if name not in weights and not name.endswith("num_batches_tracked")]
    if absent:
        raise InputError(
            f"{path}: these are not the weights of this ResNet, {len(absent)} tensors are missing "
            f"(first: {absent[0]}). {what_to_do}"
        )
    for name, tensor in wanted.items():
        if name in weights and weights[name].shape != tensor.shape:
            raise InputError(
                f"{path}: these are not the weights of this ResNet, {name} has the shape "
                f"{tuple(weights[name].shape)} instead of {tuple(tensor.shape)}. {what_to_do}"
            )
    backbone.load_state_dict({name: weights.get(name, tensor) for name, tensor in wanted.items()})
