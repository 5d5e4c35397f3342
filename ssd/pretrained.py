"""A trained network out of its checkpoint, which is all that is needed to use it."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from detection.config.settings import InputError
from detection.data import coco
from detection.data.coco import Category
from ssd import weights
from ssd.config import Config
from ssd.model import make_model

AS_EVALUATED = ("score_threshold", "nms_threshold", "max_detections")


@dataclass(frozen=True)
class Trained:
    """The network, in evaluation mode on the CPU, and what its labels stand for: label i is categories[i - 1].

    score_threshold, nms_threshold, max_detections: as it was evaluated.
    """

    model: nn.Module
    categories: tuple[Category, ...]
    score_threshold: float
    nms_threshold: float
    max_detections: int


def load(path: Path) -> Trained:
    """Read a checkpoint of a run, or a public one; raises InputError that says what is wrong with the file.

    Those that hold no names of categories call them by number.
    """
    read = weights.read(path)
    network = weights.network_of(read.state)
    if not network.trunk or network.num_classes < 2:
        raise InputError(f"{path}: {network}")
    values = {name: read.settings[name] for name in AS_EVALUATED if name in read.settings}
    values |= {"network": network.name, "trunk": network.trunk, "num_classes": network.num_classes}
    settings = Config(**values)
    model = make_model(settings)
    weights.put(read, model, path)
    model.eval()
    return Trained(
        model,
        read.categories or coco.numbered(network.num_classes),
        score_threshold=settings.score_threshold,
        nms_threshold=settings.nms_threshold,
        max_detections=settings.max_detections,
    )
