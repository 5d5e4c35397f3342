"""Trained network from a checkpoint, ready for inference without the run's settings or data."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from detection.config.settings import InputError
from detection.data import coco
from detection.data.coco import Category
from ssd import weights
from ssd.config import Config
from ssd.model import make_model

EVAL_SETTINGS = ("score_threshold", "nms_threshold", "max_detections")


@dataclass(frozen=True)
class TrainedModel:
    """Network in evaluation mode on the CPU, with its categories: label i is categories[i - 1].

    score_threshold, nms_threshold, max_detections: values of the run's evaluation, or the defaults.
    """

    model: nn.Module
    categories: tuple[Category, ...]
    score_threshold: float
    nms_threshold: float
    max_detections: int


def load(path: Path) -> TrainedModel:
    """Read a checkpoint of a run, or a public one. Raise InputError if the file cannot be used.

    A checkpoint without category names gets numbers for names.
    """
    loaded = weights.read(path)
    network = weights.infer_network(loaded.state)
    if not network.backbone or network.num_classes < 2:
        raise InputError(f"{path}: holds {network}. Name a checkpoint of an SSD300.")
    values = {name: loaded.settings[name] for name in EVAL_SETTINGS if name in loaded.settings}
    values |= {"network": network.name, "backbone": network.backbone, "num_classes": network.num_classes}
    settings = Config(**values)
    model = make_model(settings)
    weights.load_into(loaded, model, settings, path)
    model.eval()
    return TrainedModel(
        model,
        loaded.categories or coco.anonymous_categories(network.num_classes),
        score_threshold=settings.score_threshold,
        nms_threshold=settings.nms_threshold,
        max_detections=settings.max_detections,
    )
