"""Weights of the whole network: our checkpoints and torchvision's; and of the trunk alone: ImageNet's.

torchvision's are trained with what `--variant torchvision` sets; Detectron's R-50.pkl, which the MLPerf reference
starts from, with the reference's own settings.
"""

import codecs
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from detection.checkpoint import pretrained_backbone
from detection.checkpoint import weights as files
from detection.checkpoint.weights import OURS, Weights
from detection.config.settings import InputError
from maskrcnn.config import Config
from maskrcnn.model import MaskRCNN, make_model

TORCHVISION = "torchvision"

# torchvision's names to ours; the last three are those of its older files.
NAMES = (
    (r"^roi_heads\.box_head\.", "box_head.features."),
    (r"^roi_heads\.box_predictor\.", "box_head.predictor."),
    (r"^roi_heads\.mask_head\.", "mask_head.features."),
    (r"^roi_heads\.mask_predictor\.", "mask_head.predictor."),
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    (r"^(backbone\.fpn\.\w+_blocks\.\d)\.(weight|bias)$", r"\1.0.\2"),
    (r"^mask_head\.features\.mask_fcn(\d)\.", lambda match: f"mask_head.features.{int(match[1]) - 1}.0."),
)
HEADS = ("box_head.predictor.cls_score", "box_head.predictor.bbox_pred", "mask_head.predictor.mask_fcn_logits")

# COCO's category ids run to 90; torchvision has a class for each, those that no category has included.
COCO_IDS = 91
UNUSED_COCO_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


def read(path: Path) -> Weights:
    """Read a checkpoint of either; raises InputError where it is none, damaged, or holds code."""
    content = files.read(path, what_to_do="Name a checkpoint.")
    state = files.of_model(content, path)
    if "box_head.predictor.cls_score.bias" in state:
        return files.of_run(content, state)
    if "roi_heads.box_predictor.cls_score.bias" in state:
        return Weights(of_coco(from_torchvision(state)), TORCHVISION)
    first = next(iter(state), "nothing at all")
    raise InputError(
        f"{path}: these are not the weights of a Mask R-CNN (the first is {first}). --weights takes a checkpoint of "
        f"{OURS} or of torchvision's maskrcnn_resnet50_fpn; weights of the trunk alone are for --pretrained-backbone."
    )


def num_classes(state: Mapping[str, Tensor]) -> int:
    """How many classes a network with these tensors, under our names, tells apart: categories and the background."""
    return len(state["box_head.predictor.cls_score.bias"])


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under our names."""
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in NAMES:
            name = re.sub(theirs, ours, name)
        renamed[name] = tensor
    return renamed


def of_coco(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Heads with a class for every category id up to 90 become such with COCO's 80 categories alone."""
    if num_classes(state) != COCO_IDS:
        return state
    kept = [category_id for category_id in range(COCO_IDS) if category_id not in UNUSED_COCO_IDS]
    for head in HEADS:
        for name in (f"{head}.weight", f"{head}.bias"):
            of_class = state[name].unflatten(0, (COCO_IDS, -1))
            state[name] = of_class[kept].flatten(0, 1)
    return state


def wanted(config: Config) -> dict[str, Tensor]:
    """The state dict of the network of the settings, without memory behind it."""
    with torch.device("meta"):
        return make_model(config).state_dict()


def check(weights: Weights, config: Config, path: Path) -> None:
    """Raise InputError where the weights are not of the network of the settings, or trained with other ones."""
    if weights.origin == TORCHVISION and config.variant != "torchvision":
        raise InputError(f"{path} is torchvision's, which is trained on other pixels. Pass --variant torchvision")
    theirs = num_classes(weights.state)
    if theirs != config.num_classes:
        raise InputError(
            f"{path} tells {theirs} classes apart, and the settings ask for {config.num_classes}. "
            f"Pass --num-classes {theirs}, or another --weights"
        )
    files.check(weights.state, wanted(config), config.network_name, path)


def load(model: MaskRCNN, config: Config, path: Path) -> Weights:
    """Load a file into the network of the settings, on the CPU; raises InputError where it is of another one."""
    weights = read(path)
    put(weights, model, config, path)
    return weights


def put(weights: Weights, model: MaskRCNN, config: Config, path: Path) -> None:
    """Put weights read from `path` into the network of the settings; raises InputError where they are of another."""
    check(weights, config, path)
    files.put(weights, model)


def check_trunk(config: Config) -> None:
    """Raise InputError where the trunk's ImageNet weights are not of the kind that the settings are for."""
    path = Path(config.trunk_weights)
    msra = (config.stride_in_1x1, config.input_format, config.batch_norm_eps) == (True, "caffe-bgr", 0)
    if (path.suffix == ".pkl") == msra:
        return
    whose, other, what_to_do = (
        ("torchvision's", "MSRA's", "name R-50.pkl, or pass --variant torchvision")
        if msra
        else ("MSRA's", "torchvision's", "name torchvision's file, or leave out --variant torchvision")
    )
    raise InputError(
        f"{path}: these weights are {whose}, and stride_in_1x1, pixels and batch_norm_eps are for {other}: {what_to_do}"
    )


def load_trunk(model: MaskRCNN, config: Config) -> None:
    """Load the ImageNet weights that the settings name into the trunk, on the CPU; raises InputError."""
    path = Path(config.trunk_weights)
    check_trunk(config)
    if path.suffix == ".pkl":
        pretrained_backbone.put(from_detectron(read_pickle(path)), model.backbone.body, config.backbone, path)
    else:
        pretrained_backbone.load(model.backbone.body, config.backbone, path)


class _Arrays(pickle.Unpickler):
    """Reads arrays in plain containers, and calls nothing else that a file may name."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module.endswith("core.multiarray"):
            return np.zeros(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return codecs.encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of Detectron's R-50.pkl, whose names are Caffe2's; raises InputError. No code in it is run."""
    try:
        with path.open("rb") as file:
            content = unpickle(file)
        blobs = content.get("blobs", content)
        return {name: torch.from_numpy(blob) for name, blob in blobs.items() if isinstance(blob, np.ndarray)}
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the weights of Detectron's R-50.pkl ({error})") from error


def unpickle(file: IO[bytes]) -> Any:
    """What Python 2 has pickled."""
    return _Arrays(file, encoding="latin1").load()


def from_detectron(blobs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trunk's tensors under torchvision's names; batch norm is a factor and a summand, with all else in them."""
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
