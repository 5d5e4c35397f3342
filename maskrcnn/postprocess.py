"""What Mask R-CNN sees in a batch of images.

B images, D detections of the image with the most, S side of a mask (28).
"""

from typing import NamedTuple

from torch import Tensor


class Detections(NamedTuple):
    """Detections of a batch, image by image.

    boxes_xyxy: (B, D, 4) pixels of the resized image. scores: (B, D) in [0, 1]. labels: (B, D) in 1..K-1, 0 is padding.
    masks: (B, D, S, S) probabilities of being inside the object, of the label's class, over the box.
    """

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor
