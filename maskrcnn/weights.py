"""Weights of the whole network, from three programs, and ImageNet weights of the backbone.

torchvision's weights fit the settings of `--variant torchvision`. Detectron's R-50.pkl, from which the MLPerf reference
starts, fits the reference's settings.
"""

import codecs
import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from detection.checkpoint import class_outputs, pretrained_backbone, tensor_file
from detection.checkpoint import weights as files
from detection.checkpoint.class_outputs import ClassLayer
from detection.checkpoint.weights import THIS_PROGRAM, RenamePatterns, Weights
from detection.config.settings import InputError
from maskrcnn import checkpoint_names
from maskrcnn.config import Config
from maskrcnn.model import MaskRCNN, make_model

TORCHVISION, REFERENCE = "torchvision", "the MLPerf reference"

# Patterns of torchvision's tensor names and our names; the last three match its older files.
TORCHVISION_RENAMES: RenamePatterns = (
    (r"^roi_heads\.box_head\.", "box_head.features."),
    (r"^roi_heads\.box_predictor\.", "box_head.predictor."),
    (r"^roi_heads\.mask_head\.", "mask_head.features."),
    (r"^roi_heads\.mask_predictor\.", "mask_head.predictor."),
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    (r"^(backbone\.fpn\.\w+_blocks\.\d)\.(weight|bias)$", r"\1.0.\2"),
    (r"^mask_head\.features\.mask_fcn(\d)\.", lambda match: f"mask_head.features.{int(match[1]) - 1}.0."),
)
CLASS_LAYERS = tuple(
    map(
        ClassLayer,
        ("box_head.predictor.cls_score", "box_head.predictor.bbox_pred", "mask_head.predictor.mask_fcn_logits"),
    )
)

# The tensor with the number of classes, by origin.
ORIGINS = {
    "box_head.predictor.cls_score.bias": THIS_PROGRAM,
    "roi_heads.box_predictor.cls_score.bias": TORCHVISION,
    "roi_heads.box.predictor.cls_score.bias": REFERENCE,
}


def read(path: Path) -> Weights:
    """Read a checkpoint of any origin. Raise InputError if it is not one, is damaged, or holds code."""
    content = tensor_file.read(path, hint="Name a checkpoint.")
    marker, state = files.find_network(content, path, "a Mask R-CNN", tuple(ORIGINS))
    origin = ORIGINS[marker]
    if origin == THIS_PROGRAM:
        return files.from_run_checkpoint(content, state)
    ours = from_torchvision(state) if origin == TORCHVISION else checkpoint_names.from_reference(state)
    return drop_unused_coco_classes(Weights(ours, origin))


def num_classes(state: Mapping[str, Tensor]) -> int:
    """Return the number of classes, with the background, of a state dict with our names."""
    return class_outputs.count_classes(state, CLASS_LAYERS[0])


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename torchvision's tensors to our names."""
    return files.rename(state, TORCHVISION_RENAMES)


def drop_unused_coco_classes(weights: Weights) -> Weights:
    """Reduce heads with a class for each category id up to 90 to COCO's 80 categories."""
    if num_classes(weights.state) != class_outputs.NUM_COCO_IDS:
        return weights
    categories = class_outputs.coco_categories()
    kept = [0, *(category.id for category in categories)]
    return replace(weights, state=class_outputs.select(weights.state, CLASS_LAYERS, kept), categories=categories)


def check_compatible(weights: Weights, config: Config, path: Path) -> None:
    """Raise InputError unless the weights fit the settings and their network, apart from its number of classes."""
    if weights.origin == TORCHVISION and config.variant != "torchvision":
        raise InputError(f"{path}: torchvision's weights expect another input format. Pass --variant torchvision.")
    class_outputs.check_compatible(weights, CLASS_LAYERS, make_model, config, path)


def load(model: MaskRCNN, config: Config, path: Path) -> Weights:
    """Load a checkpoint into the network, on the CPU. Raise InputError if it does not fit (`class_outputs.load`)."""
    weights = read(path)
    check_compatible(weights, config, path)
    return class_outputs.load(weights, CLASS_LAYERS, model, config, path)


def load_into(weights: Weights, model: MaskRCNN, config: Config, path: Path) -> None:
    """Load weights read from `path` into the network, on the CPU. Raise InputError if they do not fit."""
    check_compatible(weights, config, path)
    files.load_into(weights, model)


def check_backbone(config: Config) -> None:
    """Raise InputError if the backbone's ImageNet weights do not match the settings."""
    path = Path(config.backbone_weights)
    msra = (config.stride_in_1x1, config.input_format, config.batch_norm_eps) == (True, "caffe-bgr", 0)
    if (path.suffix == ".pkl") == msra:
        return
    actual, expected, hint = (
        ("torchvision's", "MSRA's", "Name R-50.pkl, or pass --variant torchvision.")
        if msra
        else ("MSRA's", "torchvision's", "Name torchvision's file, or omit --variant torchvision.")
    )
    raise InputError(
        f"{path}: these weights are {actual}, but stride_in_1x1, input_format and batch_norm_eps fit {expected}. {hint}"
    )


def load_backbone(model: MaskRCNN, config: Config) -> None:
    """Load the ImageNet weights of the settings into the backbone, on the CPU; raise InputError."""
    path = Path(config.backbone_weights)
    check_backbone(config)
    if path.suffix == ".pkl":
        pretrained_backbone.load_into(from_detectron(read_pickle(path)), model.backbone.body, config.backbone, path)
    else:
        pretrained_backbone.load(model.backbone.body, config.backbone, path)


class ArrayOnlyUnpickler(pickle.Unpickler):
    """Unpickler that reads only arrays and built-in containers: it rejects any other callable that a file names."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the array constructors; reject everything else."""
        if name == "_reconstruct" and module.endswith("core.multiarray"):
            return np.zeros(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # Python 3 writes bytes this way for Python 2
            return codecs.encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of Detectron's R-50.pkl, by their Caffe2 names; never run its code; raise InputError."""
    try:
        with path.open("rb") as file:
            content = load_py2_pickle(file)
        blobs = content.get("blobs", content)
        return {name: torch.from_numpy(blob) for name, blob in blobs.items() if isinstance(blob, np.ndarray)}
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the weights of Detectron's R-50.pkl ({error})") from error


def load_py2_pickle(file: IO[bytes]) -> Any:
    """Load a pickle that Python 2 wrote."""
    return ArrayOnlyUnpickler(file, encoding="latin1").load()


def from_detectron(blobs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the backbone's tensors to torchvision's; their batch norm is a scale and a bias with statistics folded."""
    state = {}
    for name, tensor in blobs.items():
        if match := re.fullmatch(r"(?:res_)?conv1_(w|bn_s|bn_b)", name):
            layer = ("conv1", "bn1")
        elif match := re.fullmatch(r"res(\d)_(\d+)_branch(1|2[abc])_(w|bn_s|bn_b)", name):
            block = f"layer{int(match[1]) - 1}.{match[2]}"
            number = "abc".find(match[3][-1]) + 1
            layer = (
                (f"{block}.conv{number}", f"{block}.bn{number}")
                if number
                else (f"{block}.downsample.0", f"{block}.downsample.1")
            )
        else:
            continue
        kind = match[match.lastindex or 1]
        if kind == "w":
            state[f"{layer[0]}.weight"] = tensor
        else:
            state[f"{layer[1]}.{'weight' if kind == 'bn_s' else 'bias'}"] = tensor
        if kind == "bn_s":
            state[f"{layer[1]}.running_mean"] = torch.zeros_like(tensor)
            state[f"{layer[1]}.running_var"] = torch.ones_like(tensor)
    return state
