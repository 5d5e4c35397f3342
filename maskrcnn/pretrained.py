"""Trained network from a checkpoint, ready for inference without the run's settings or data."""

from dataclasses import dataclass, fields
from pathlib import Path

from detection.checkpoint.weights import Weights
from detection.config.run_config import RunConfig
from detection.config.settings import InputError
from detection.data import coco
from detection.data.coco import Category
from maskrcnn import weights
from maskrcnn.config import Config
from maskrcnn.config import load as load_config
from maskrcnn.model import MaskRCNN, make_model
from maskrcnn.weights import TORCHVISION, num_classes


@dataclass(frozen=True)
class TrainedModel:
    """Network in evaluation mode on the CPU, with its categories: label i is categories[i - 1].

    min_size_px, max_size_px: size of its resized images, as for `data.resized_hw`.
    """

    model: MaskRCNN
    categories: tuple[Category, ...]
    min_size_px: int
    max_size_px: int


def load(path: Path, score_threshold: float | None) -> TrainedModel:
    """Read a checkpoint of a run, or torchvision's. Raise InputError if the file cannot be used.

    The model drops detections below score_threshold, by default that of the run's evaluation. A checkpoint without
    category names gets numbers for names.
    """
    loaded = weights.read(path)
    config = resolve_config(loaded, score_threshold, path)
    model = make_model(config)
    weights.load_into(loaded, model, config, path)
    model.eval()
    categories = loaded.categories or coco.anonymous_categories(config.num_classes)
    return TrainedModel(model, categories, config.min_image_size, config.max_image_size)


def resolve_config(loaded: Weights, score_threshold: float | None, path: Path) -> Config:
    """Return the settings with which the weights were trained. Raise InputError if the file does not hold them."""
    if loaded.origin == TORCHVISION:
        flags = ["--variant", "torchvision", "--num-classes", str(num_classes(loaded.state))]
        flags += [] if score_threshold is None else ["--score-threshold", str(score_threshold)]
        return load_config(flags, {}).config
    if not loaded.settings:
        raise InputError(f"{path}: holds no settings of its network. Name a file of a run's checkpoints/.")
    # The shared settings concern where and how fast a run trains, not the network.
    names = {field.name for field in fields(Config)} - {field.name for field in fields(RunConfig)}
    values = {name: value for name, value in loaded.settings.items() if name in names}
    values |= {"num_classes": num_classes(loaded.state)}
    values |= {} if score_threshold is None else {"score_threshold": score_threshold}
    return Config(**values)
