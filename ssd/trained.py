"""A trained network out of its checkpoint, which is all that is needed to use it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from detection import batch_norm, checkpoint
from detection.coco import Category
from detection.config import InputError
from ssd.config import Config
from ssd.model import SSD300


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
    """Read the checkpoint of a run; raises InputError that says what is wrong with the file.

    Checkpoints that are older than the names in them call their categories by number.
    """
    state = checkpoint.load(path, benchmark=Config.benchmark)
    settings: Mapping[str, Any] = json.loads(state["config"])
    model = SSD300(settings["num_classes"])
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{path}: the checkpoint is of another network ({reason})") from error
    batch_norm.set_statistics(model, state["batch_norm"].mean(dim=0))  # of all ranks, as for an evaluation
    model.eval()
    named = [Category(**category) for category in state.get("categories", ())]
    numbered = [Category(label, str(label)) for label in range(1, model.num_classes)]
    return Trained(
        model,
        tuple(named or numbered),
        score_threshold=settings["score_threshold"],
        nms_iou=settings["nms_iou"],
        max_detections=settings["max_detections"],
    )
