"""Images and boxes to train on. Imports no torch, so that checks respond at once."""

from detection.data.coco import Split
from retinanet.config import Config


def select_train_images(config: Config, split: Split) -> Split:
    """Return the images to train on: all of them, those without boxes included, as in the reference."""
    return split if config.train_crowds else split.drop_crowds()
