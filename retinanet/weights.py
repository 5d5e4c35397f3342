"""Weights of the whole network, from checkpoints of this program, the MLPerf reference and torchvision."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from detection.checkpoint import class_outputs, tensor_file
from detection.checkpoint import weights as files
from detection.checkpoint.class_outputs import ClassLayer
from detection.checkpoint.weights import RenamePatterns, Weights
from retinanet.anchors import ANCHORS_PER_CELL
from retinanet.config import Config
from retinanet.model import RetinaNet, make_model

TORCHVISION, REFERENCE = "torchvision", "the MLPerf reference"
CLASS_LAYERS = (ClassLayer("head.classification_head.cls_logits", num_groups=ANCHORS_PER_CELL, first_label=1),)

# Patterns of the tensor names of the MLPerf reference and of older files of torchvision, and our names.
FROM_REFERENCE: RenamePatterns = (
    (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$", r"\1.0.\2"),
    (r"^(head\.\w+\.conv\.)([0246])\.(weight|bias)$", lambda match: f"{match[1]}{int(match[2]) // 2}.0.{match[3]}"),
)
TO_REFERENCE: RenamePatterns = (
    (r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.0\.", r"\1."),
    (r"^(head\.\w+\.conv\.)(\d)\.0\.", lambda match: f"{match[1]}{2 * int(match[2])}."),
)


def read(path: Path) -> Weights:
    """Read a checkpoint of any origin. Raise InputError if it is not one, is damaged, or holds code."""
    content = tensor_file.read(path, hint="Name a checkpoint.")
    _, state = files.find_network(content, path, "a RetinaNet", [f"{CLASS_LAYERS[0].name}.bias"])
    if "benchmark" in content:
        return files.from_run_checkpoint(content, state)
    origin = REFERENCE if "head.classification_head.conv.2.weight" in state else TORCHVISION
    return drop_unused_coco_classes(Weights(from_reference(state), origin))


def from_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of the MLPerf reference or torchvision to our names."""
    return files.rename(state, FROM_REFERENCE)


def to_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our tensors, or some of them, to the names of the MLPerf reference, whose order is the same.

    Its batch norm, which is always frozen, does not count batches.
    """
    kept = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    return files.rename(kept, TO_REFERENCE)


def drop_unused_coco_classes(weights: Weights) -> Weights:
    """Reduce torchvision's head with an output for each COCO id up to 90 to the 80 categories."""
    if num_outputs(weights.state) != class_outputs.NUM_COCO_IDS:
        return weights
    categories = class_outputs.coco_categories()
    kept = [0, *(1 + category.id for category in categories)]  # its first output is that of the unused id 0
    return replace(weights, state=class_outputs.select(weights.state, CLASS_LAYERS, kept), categories=categories)


def num_outputs(state: Mapping[str, Tensor]) -> int:
    """Return the number of class outputs of a state dict with our names."""
    return class_outputs.count_classes(state, CLASS_LAYERS[0]) - 1


def check_compatible(weights: Weights, config: Config, path: Path) -> None:
    """Raise InputError unless the weights fit the network of the settings, apart from its number of classes."""
    class_outputs.check_compatible(weights, CLASS_LAYERS, make_model, config, path)


def load(model: RetinaNet, config: Config, path: Path) -> Weights:
    """Load a checkpoint into the network, on the CPU. Raise InputError if it does not fit (`class_outputs.load`)."""
    weights = read(path)
    check_compatible(weights, config, path)
    return class_outputs.load(weights, CLASS_LAYERS, model, config, path)


def load_into(weights: Weights, model: RetinaNet, config: Config, path: Path) -> None:
    """Load weights read from `path` into the network, on the CPU. Raise InputError if they do not fit."""
    check_compatible(weights, config, path)
    files.load_into(weights, model)
