"""Declarations of Mask R-CNN for the commands of `detection.cli`. Imports torch only inside functions."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from detection.preflight import run_checks
from maskrcnn.config import PREFIX, Config, load
from maskrcnn.train_images import select_train_images
from mlperf.recipes import Recipe

if TYPE_CHECKING:
    from torch import nn

    from detection.engine.workload import Workload
    from detection.runtime.distributed import DistContext
    from detection.tuning.search import TuneTarget
    from maskrcnn.data import Batch


def rule_values(config: Config, world_size: int) -> Mapping[str, object]:
    """Return the values that the MLPerf rules constrain."""
    accuracy = {"BBOX": config.target, "SEGM": config.mask_target}
    return config.hyperparameters(world_size) | {"eval_accuracy": accuracy}


def image_bytes(config: Config) -> int:
    """Return the size in bytes of the largest padded image that a worker passes on.

    Sides are multiples of 32. Without aspect-ratio groups, the short side of one image may be padded to the long side
    of another.
    """
    short, long = (-(-size // 32) * 32 for size in (config.min_image_size, config.max_image_size))
    return 3 * long * (short if config.group_by_aspect_ratio else long)


def describe_checkpoint(path: Path, config: Config, initialize: bool) -> str:
    """Describe a weights file. Raise InputError if it does not fit the network of the settings, or their classes.

    initialize: the outputs of new classes may be initialized.
    """
    from detection.checkpoint import class_outputs  # these import torch, which only this check needs
    from maskrcnn import weights

    loaded = weights.read(path)
    weights.check_compatible(loaded, config, path)
    report = class_outputs.match(loaded, weights.CLASS_LAYERS, config, path, initialize=initialize).report
    return f"{loaded.origin}; {config.network_name} for {weights.num_classes(loaded.state)} classes; {report}"


def make_model(config: Config) -> "nn.Module":
    """Build the network of the settings, with random weights."""
    from maskrcnn import model

    return model.make_model(config)


def recipe_settings(recipe: Recipe) -> dict[str, str]:
    """Return a recipe as settings."""
    decay_tenths = 10 + recipe.decay_k
    return {
        "base_lr": f"{recipe.base_lr:g}",
        "lr_round_to": f"{recipe.lr_round_to:g}",
        "warmup_steps": str(recipe.warmup),
        "lr_decay_images": f"{96_000 * decay_tenths},{128_000 * decay_tenths}",
    }


def make_random_workload(config: Config, ranks: "DistContext") -> "Workload[Batch]":
    """Assemble Mask R-CNN with random weights for the training loop."""
    from maskrcnn.evaluator import MaskRCNNEvaluator
    from maskrcnn.model import make_model
    from maskrcnn.train import make_workload, predict

    return make_workload(config, ranks, 0, make_model(config), MaskRCNNEvaluator(config, ranks, predict))


PREFLIGHT = run_checks.PreflightSpec(
    load=load,
    rule_values=rule_values,
    image_bytes=image_bytes,
    check_weights=describe_checkpoint,
    make_model=make_model,
    select_train_images=select_train_images,
    segmentations=True,
)


def make_tune_target() -> "TuneTarget[Config]":
    """Return what the search for the fastest settings needs."""
    from detection.tuning.search import TuneTarget

    return TuneTarget("maskrcnn", PREFIX, PREFLIGHT, recipe_settings)
