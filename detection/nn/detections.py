"""Detections of a batch of images, in one flat list."""

from typing import NamedTuple

from torch import Tensor


class Detections(NamedTuple):
    """Detections of a batch, ordered by image and then by descending score.

    batch_index: (D,) position of the image in the batch. boxes_xyxy: (D, 4) in the unit of the network that made them.
    labels: (D,) from 1. scores: (D,) in [0, 1].
    """

    batch_index: Tensor
    boxes_xyxy: Tensor
    labels: Tensor
    scores: Tensor
