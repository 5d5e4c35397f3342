"""Declarations of SSD300 for the commands of `detection.cli`. Imports torch only inside functions."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from detection.preflight import run_checks
from mlperf.recipes import Recipe
from ssd.config import PREFIX, Config, load
from ssd.train_images import select_train_images

if TYPE_CHECKING:
    from torch import nn

    from detection.engine.workload import Workload
    from detection.runtime.distributed import DistContext
    from detection.tuning.search import TuneTarget
    from ssd.data import Batch

IMAGE_BYTES = 3 * 300 * 300


def rule_values(config: Config, world_size: int) -> Mapping[str, object]:
    """Return the values that MLPerf's rules constrain."""
    return config.hyperparameters(world_size) | {"eval_accuracy": config.target}


def describe_checkpoint(path: Path, config: Config, initialize: bool) -> str:
    """Describe a weights file. Raise InputError if it does not fit the network of the settings, or their classes.

    initialize: the outputs of new classes may be initialized.
    """
    from detection.checkpoint import class_outputs  # these import torch, which only this check needs
    from ssd import weights

    loaded = weights.read(path)
    weights.check_compatible(loaded, config, path)
    report = class_outputs.match(loaded, weights.CLASS_LAYERS, config, path, initialize=initialize).report
    return f"{loaded.origin}; {weights.infer_network(loaded.state)}; {report}"


def make_model(config: Config) -> "nn.Module":
    """Build the network of the settings, with random weights."""
    from ssd import model

    return model.make_model(config)


def recipe_settings(recipe: Recipe) -> dict[str, str]:
    """Convert a recipe to settings by name."""
    decay_tenths = 10 + recipe.decay_k
    return {
        "base_lr": f"{recipe.base_lr:g}",
        "lr_round_to": f"{recipe.lr_round_to:g}",
        "warmup_steps": str(recipe.warmup),
        "weight_decay": f"{recipe.weight_decay:g}",
        "lr_decay_epochs": f"{4 * decay_tenths},{5 * decay_tenths}",
        "max_samples": str(recipe.max_samples),
    }


def make_random_workload(config: Config, ranks: "DistContext") -> "Workload[Batch]":
    """Assemble SSD300 with random weights for the training loop."""
    from ssd.evaluator import SSDEvaluator
    from ssd.model import make_model
    from ssd.train import make_workload

    return make_workload(config, ranks, 0, make_model(config), SSDEvaluator(config, ranks))


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

    return TuneTarget("ssd", PREFIX, PREFLIGHT, recipe_settings)
