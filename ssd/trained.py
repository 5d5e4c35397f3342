"""A trained network out of its checkpoint, which is all that is needed to use it."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from detection.coco import Category
from detection.config import InputError
from ssd import weights
from ssd.config import Config
from ssd.model import SSD300

AS_EVALUATED = ("score_threshold", "nms_iou", "max_detections")


@dataclass(frozen=True)
class Trained:
    """The network, in evaluation mode on the CPU, and what its labels stand for: label i is categories[i - 1].

    score_threshold, nms_iou, max_detections: as it was evaluated.
    """

    model: nn.Module
    categories: tuple[Category, ...]
    score_threshold: float
    nms_iou: float
    max_detections: int


def load(path: Path) -> Trained:
    """Read a checkpoint of a run, or a public one; raises InputError that says what is wrong with the file.

    Those that hold no names of categories call them by number.
    """
    read = weights.read(path)
    network = read.network
    if not network.trunk:
        raise InputError(f"{path}: {network}")
    model = SSD300(network.num_classes, network.trunk, batch_norm=network.name == "ssd300-r50")
    weights.put(read, model, path)
    model.eval()
    numbered = [Category(label, str(label)) for label in range(1, model.num_classes)]
    settings = Config(**{name: read.settings[name] for name in AS_EVALUATED if name in read.settings})
    return Trained(
        model,
        read.categories or tuple(numbered),
        score_threshold=settings.score_threshold,
        nms_iou=settings.nms_iou,
        max_detections=settings.max_detections,
    )
