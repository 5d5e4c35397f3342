"""Images to train on. Imports no torch, so that checks respond at once."""

from detection.data.coco import Split
from ssd.config import Config


def select_train_images(config: Config, split: Split) -> Split:
    """Return the images to train on: those with a box, or all. A crowd counts as a box."""
    return split if config.background_images == "keep" else split.drop_empty_images()
