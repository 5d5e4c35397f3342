"""The checkpoints of the MLPerf reference and of SSD300 v1.1: their names, and the way to and from ours.

Both have one convolution for boxes and one for classes on each map, with channels coordinate·n + k and
class·n + k for anchor k of the n of a cell. Ours is one fused head with channels k·(4 + K) + {4 deltas, K logits}.
The anchors have the same order in all three.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ssd.anchors import ANCHORS_PER_CELL
from ssd.model import SSD300

TRUNK_NAMES = {
    "model.layer1.0.": "backbone.conv1.",
    "model.layer1.1.": "backbone.bn1.",
    "model.layer1.4.": "backbone.layer1.",
    "model.layer1.5.": "backbone.layer2.",
    "model.layer2.0.": "backbone.layer3.",
}
EXTRA_NAMES = {
    f"additional_blocks.{i}.{theirs}.": f"extras.{i}.{ours}."
    for i in range(5)
    for theirs, ours in ((0, "conv1"), (2, "conv2"))
}
NAMES = TRUNK_NAMES | EXTRA_NAMES
V1_1_NAMES = {
    f"feature_extractor.feature_extractor.{theirs}.": f"backbone.{ours}."
    for theirs, ours in ((0, "conv1"), (1, "bn1"), (4, "layer1"), (5, "layer2"), (6, "layer3"))
} | {
    f"additional_blocks.{i}.{theirs}.": f"extras.{i}.{ours}."
    for i in range(5)
    for theirs, ours in ((0, "conv1"), (1, "bn1"), (3, "conv2"), (4, "bn2"))
}


def rename(name: str, prefixes: Mapping[str, str]) -> str:
    """Replace the one prefix of the table that a tensor's name starts with; KeyError where there is none."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise KeyError(name)


def to_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert our state dict to the reference's names, shapes and order."""
    prefixes = {ours: theirs for theirs, ours in NAMES.items()}
    shared = {rename(name, prefixes): t for name, t in state.items() if not name.startswith("heads.")}
    boxes, classes = {}, {}
    for level, num_anchors in enumerate(ANCHORS_PER_CELL):
        for kind in ("weight", "bias"):
            fused = state[f"heads.{level}.{kind}"].unflatten(0, (num_anchors, -1)).transpose(0, 1)
            boxes[f"loc.{level}.{kind}"] = fused[:4].flatten(0, 1)
            classes[f"conf.{level}.{kind}"] = fused[4:].flatten(0, 1)
    return shared | boxes | classes


def from_reference(state: Mapping[str, Tensor], names: Mapping[str, str] = NAMES) -> dict[str, Tensor]:
    """Convert a state dict of the reference, or one of V1_1_NAMES, to ours.

    KeyError names a tensor that is missing or unknown.
    """
    ours = {rename(name, names): t for name, t in state.items() if not name.startswith(("loc.", "conf."))}
    for level, num_anchors in enumerate(ANCHORS_PER_CELL):
        for kind in ("weight", "bias"):
            parts = [state[f"{part}.{level}.{kind}"].unflatten(0, (-1, num_anchors)) for part in ("loc", "conf")]
            ours[f"heads.{level}.{kind}"] = torch.cat(parts).transpose(0, 1).flatten(0, 1)
    return ours


def tensor_kinds() -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and kind of each tensor in the reference's checkpoint order.

    The kind says how a conformance vector fills it: conv, bias, bn_weight, running_mean, running_var, counter.
    """
    with torch.device("meta"):
        state = to_reference(SSD300().state_dict())
    return [(name, tuple(tensor.shape), kind_of(name, tensor)) for name, tensor in state.items()]


def kind_of(name: str, tensor: Tensor) -> str:
    """Kind of a tensor by its name and number of dimensions."""
    last = name.rpartition(".")[2]
    if last == "num_batches_tracked":
        return "counter"
    if last == "weight":
        return "conv" if tensor.dim() == 4 else "bn_weight"
    return last
