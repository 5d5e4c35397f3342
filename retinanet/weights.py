"""Weights of the whole network, from checkpoints of this program, the MLPerf reference and torchvision."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

from detection.checkpoint import weights as files
from detection.checkpoint.weights import THIS_PROGRAM, RenamePatterns, Weights
from detection.config.settings import InputError
from retinanet.anchors import ANCHORS_PER_CELL
from retinanet.config import Config
from retinanet.model import RetinaNet, make_model

TORCHVISION, REFERENCE = "torchvision", "the MLPerf reference"
CLASS_LAYER = "head.classification_head.cls_logits"

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
    content = files.read(path, hint="Name a checkpoint.")
    state = files.model_state(content, path)
    if f"{CLASS_LAYER}.bias" not in state:
        first = next(iter(state), "missing")
        raise InputError(
            f"{path}: not the weights of a RetinaNet (the first tensor is {first}). Pass a checkpoint of "
            f"{THIS_PROGRAM}, the MLPerf reference or torchvision to --weights, and weights of a backbone to "
            "--pretrained-backbone."
        )
    if "config" in content:
        return files.from_run_checkpoint(content, state)
    origin = REFERENCE if "head.classification_head.conv.2.weight" in state else TORCHVISION
    return Weights(drop_unused_coco_classes(from_reference(state)), origin)


def from_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of the MLPerf reference or torchvision to our names."""
    return files.rename(state, FROM_REFERENCE)


def to_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our tensors, or some of them, to the names of the MLPerf reference, whose order is the same.

    Its batch norm, which is always frozen, does not count batches.
    """
    kept = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    return files.rename(kept, TO_REFERENCE)


def drop_unused_coco_classes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reduce torchvision's head with an output for each COCO id up to 90 to the 80 categories."""
    names = RetinaNet_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
    if num_outputs(state) != len(names):
        return state
    kept = [category_id for category_id, name in enumerate(names) if name not in ("__background__", "N/A")]
    files.keep_outputs(state, [CLASS_LAYER], num_groups=ANCHORS_PER_CELL, num_outputs=len(names), kept=kept)
    return state


def num_outputs(state: Mapping[str, Tensor]) -> int:
    """Return the number of class outputs of a state dict with our names."""
    return len(state[f"{CLASS_LAYER}.bias"]) // ANCHORS_PER_CELL


def check_compatible(weights: Weights, config: Config, path: Path) -> None:
    """Raise InputError if the weights do not fit the network of the settings."""
    theirs = 1 + num_outputs(weights.state)
    if theirs != config.num_classes:
        raise InputError(
            f"{path}: holds {theirs} classes, with the background, but the settings ask for {config.num_classes}. "
            f"Pass --num-classes {theirs}, or name another file."
        )
    files.check_compatible(weights.state, files.expected_state(make_model, config), config.network_name, path)


def load(model: RetinaNet, config: Config, path: Path) -> Weights:
    """Load a checkpoint into the network, on the CPU. Raise InputError if it does not fit.

    The class outputs take the order of the annotations' categories.
    """
    weights = read(path)
    check_compatible(weights, config, path)
    files.load_into(order_classes(weights, config, path), model)
    return weights


def order_classes(weights: Weights, config: Config, path: Path) -> Weights:
    """Return the weights with the class outputs in the order of the annotations. Raise InputError if the names differ.

    The weights must fit the network of the settings.
    """
    order = files.class_order(weights, config, path)
    state, kept = dict(weights.state), [label - 1 for label in order[1:]]
    files.keep_outputs(state, [CLASS_LAYER], num_groups=ANCHORS_PER_CELL, num_outputs=len(kept), kept=kept)
    return replace(weights, state=state)


def load_into(weights: Weights, model: RetinaNet, config: Config, path: Path) -> None:
    """Load weights read from `path` into the network, on the CPU. Raise InputError if they do not fit."""
    check_compatible(weights, config, path)
    files.load_into(weights, model)
