"""Declarations of RetinaNet for the commands of `detection.cli`. Imports torch only inside functions."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from detection.preflight import run_checks
from mlperf.recipes import Recipe
from retinanet.config import PREFIX, Config, load
from retinanet.train_images import select_train_images

if TYPE_CHECKING:
    from torch import nn

    from detection.engine.workload import Workload
    from detection.runtime.distributed import DistContext
    from detection.tuning.search import TuneTarget
    from retinanet.data import Batch

IMAGE_BYTES = 3 * 1024 * 1024
"""Size of an image that a worker passes on: Open Images has at most 1,024 pixels per side, padded to the batch."""


def rule_values(config: Config, world_size: int) -> Mapping[str, object]:
    """Return the values that MLPerf's rules constrain."""
    return config.hyperparameters(world_size) | {"eval_accuracy": config.target}


def describe_checkpoint(path: Path, config: Config, initialize: bool) -> str:
    """Describe a weights file. Raise InputError if it does not fit the network of the settings, or their classes.

    initialize: the outputs of new classes may be initialized.
    """
    from detection.checkpoint import class_outputs  # these import torch, which only this check needs
    from retinanet import weights

    loaded = weights.read(path)
    weights.check_compatible(loaded, config, path)
    report = class_outputs.match(loaded, weights.CLASS_LAYERS, config, path, initialize=initialize).report
    return f"{loaded.origin}; {config.network_name} for {1 + weights.num_outputs(loaded.state)} classes; {report}"


def make_model(config: Config) -> "nn.Module":
    """Build the network of the settings, with random weights."""
    from retinanet import model

    return model.make_model(config)


def recipe_settings(recipe: Recipe) -> dict[str, str]:
    """Convert a recipe to settings by name."""
    return {"base_lr": f"{recipe.base_lr:g}", "warmup_epochs": str(recipe.warmup), "eval_epochs": "every 1"}


def make_random_workload(config: Config, ranks: "DistContext") -> "Workload[Batch]":
    """Assemble RetinaNet with random weights for the training loop."""
    from retinanet.evaluator import RetinaNetEvaluator
    from retinanet.model import make_model
    from retinanet.train import make_workload

    return make_workload(config, ranks, 0, make_model(config), RetinaNetEvaluator(config, ranks))


PREFLIGHT = run_checks.PreflightSpec(
    load=load,
    rule_values=rule_values,
    image_bytes=lambda _: IMAGE_BYTES,
    check_weights=describe_checkpoint,
    make_model=make_model,
    select_train_images=select_train_images,
)


def make_tune_target() -> "TuneTarget[Config]":
    """Return what the search for the fastest settings needs."""
    from detection.tuning.search import TuneTarget

    return TuneTarget("retinanet", PREFIX, PREFLIGHT, recipe_settings)
