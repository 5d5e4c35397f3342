"""One training image as the network sees it, for people to look at."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class TrainSample(NamedTuple):
    """Augmented training image with its targets.

    image: (H, W, 3) uint8 RGB. boxes_xyxy: (G, 4) pixels, with labels (G,). anchors_xyxy: (P, 4) pixels of the anchors
    that match an object, which is number `matched` (P,).
    """

    image: NDArray[np.uint8]
    boxes_xyxy: NDArray[np.float32]
    labels: NDArray[np.int64]
    anchors_xyxy: NDArray[np.float32]
    matched: NDArray[np.int64]

    @classmethod
    def from_tensors(
        cls, image: NDArray[np.uint8], boxes_xyxy: Tensor, labels: Tensor, anchors_xyxy: Tensor, matched: Tensor
    ) -> "TrainSample":
        """Return a sample of tensors on the CPU."""
        return cls(image, boxes_xyxy.numpy(), labels.numpy(), anchors_xyxy.numpy(), matched.numpy())
