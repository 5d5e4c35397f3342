"""Images and boxes to train on. Imports no torch, so that checks respond at once."""

from detection.data.coco import Split
from retinanet.config import Config


def select_train_images(config: Config, split: Split) -> Split:
    """Return the images to train on: all of them, as in the reference, or those with a box."""
    split = split if config.train_crowds else split.drop_crowds()
    return split if config.background_images == "keep" else split.drop_empty_images()
