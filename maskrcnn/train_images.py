"""Images and boxes to train on. Imports no torch, so that checks respond at once."""

import numpy as np

from detection.data.coco import Split
from maskrcnn.config import Config

SIDE_ROUNDING_PX = 1e-3  # of a difference of two float32; COCO has two decimals


def select_train_images(config: Config, split: Split) -> Split:
    """Return the images to train on, without their crowd boxes.

    Legacy boxes of a side of at most one pixel are empty, and dropped. An image stays if it has any other box. It may
    be a crowd, so that the image has nothing to detect, as in the reference. `background_images` may keep all images.
    """
    if config.legacy_boxes:
        sides = split.boxes_xyxy[:, 2:] - split.boxes_xyxy[:, :2]
        split = split.keep_boxes(np.all(sides > 1 + SIDE_ROUNDING_PX, axis=1))
    if config.background_images == "keep":
        return split.drop_crowds()
    if config.legacy_boxes:
        return split.drop_empty_images().drop_crowds()
    return split.drop_crowds().drop_empty_images()
