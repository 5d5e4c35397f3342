"""A trained network out of its checkpoint, which is all that is needed to use it."""

from dataclasses import dataclass, fields
from pathlib import Path

from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from detection.checkpoint.weights import Weights
from detection.config.run_config import COCO_CLASSES, RunConfig
from detection.config.settings import InputError
from detection.data import coco
from detection.data.coco import Category
from maskrcnn import config, weights
from maskrcnn.config import Config
from maskrcnn.model import MaskRCNN, make_model
from maskrcnn.weights import COCO_IDS, TORCHVISION, UNUSED_COCO_IDS, num_classes


@dataclass(frozen=True)
class Trained:
    """The network, in evaluation mode on the CPU, and what its labels stand for: label i is categories[i - 1].

    min_size_px, max_size_px: what the sides of its images are resized to, as `data.resized_hw` takes them.
    """

    model: MaskRCNN
    categories: tuple[Category, ...]
    min_size_px: int
    max_size_px: int


def load(path: Path, score_threshold: float) -> Trained:
    """Read a checkpoint of a run, or torchvision's; raises InputError that says what is wrong with the file.

    score_threshold: detections below are left out. Checkpoints that hold no names of categories call them by number.
    """
    read = weights.read(path)
    settings = settings_of(read, score_threshold, path)
    model = make_model(settings)
    weights.put(read, model, settings, path)
    model.eval()
    known = coco.numbered(settings.num_classes)
    if read.origin == TORCHVISION and settings.num_classes == COCO_CLASSES:
        known = coco_categories()
    return Trained(model, read.categories or known, settings.min_image_size, settings.max_image_size)


def settings_of(read: Weights, score_threshold: float, path: Path) -> Config:
    """The settings that the weights were trained with; raises InputError where the file does not say."""
    if read.origin == TORCHVISION:
        flags = ["--variant", "torchvision", "--score-threshold", str(score_threshold)]
        return config.load([*flags, "--num-classes", str(num_classes(read.state))], {}).config
    if not read.settings:
        raise InputError(f"{path}: does not say which settings its weights are of. Name a file of a run's checkpoints/")
    # Those of every benchmark are about where and how fast it was trained.
    own = {field.name for field in fields(Config)} - {field.name for field in fields(RunConfig)}
    values = {name: value for name, value in read.settings.items() if name in own}
    values |= {"num_classes": num_classes(read.state), "score_threshold": score_threshold}
    return Config(**values)


def coco_categories() -> tuple[Category, ...]:
    """COCO's 80, in the order of their ids."""
    names = MaskRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
    return tuple(Category(id, names[id]) for id in range(1, COCO_IDS) if id not in UNUSED_COCO_IDS)
