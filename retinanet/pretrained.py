"""Trained network from a checkpoint, ready for inference without the run's settings or data."""

from dataclasses import dataclass, fields
from pathlib import Path

from detection.checkpoint.weights import Weights
from detection.config.run_config import RunConfig
from detection.data import coco
from detection.data.coco import Category
from retinanet import weights
from retinanet.config import Config
from retinanet.model import RetinaNet, make_model
from retinanet.weights import TORCHVISION, num_outputs


@dataclass(frozen=True)
class TrainedModel:
    """Network in evaluation mode on the CPU, its settings, and its categories: label i is categories[i - 1]."""

    model: RetinaNet
    config: Config
    categories: tuple[Category, ...]


def load(path: Path) -> TrainedModel:
    """Read a checkpoint of a run, the MLPerf reference or torchvision. Raise InputError if the file cannot be used.

    A checkpoint without category names gets numbers for names.
    """
    loaded = weights.read(path)
    config = resolve_config(loaded)
    model = make_model(config)
    weights.load_into(loaded, model, config, path)
    model.eval()
    return TrainedModel(model, config, loaded.categories or coco.anonymous_categories(config.num_classes))


def resolve_config(loaded: Weights) -> Config:
    """Return the settings with which the weights were trained, as far as the network and its detections need them."""
    # The shared settings concern where and how fast a run trains, not the network.
    names = {field.name for field in fields(Config)} - {field.name for field in fields(RunConfig)}
    values = {name: value for name, value in loaded.settings.items() if name in names}
    if loaded.origin == TORCHVISION:
        values["backbone"] = "resnet50"
    return Config(**values | {"num_classes": 1 + num_outputs(loaded.state)})
