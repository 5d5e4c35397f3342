"""Detection on image files, with the network of a checkpoint.

    python -m ssd predict CHECKPOINT IMAGE... [--folder D] [--score 0.3]

detection/evaluation/predict.py describes the input and output.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detection.data import image_io
from detection.data.coco import Category
from detection.evaluation import predict
from detection.evaluation.predict import ImageDetections
from ssd import augment, pretrained
from ssd.anchors import IMAGE_SIZE_PX, make_anchors
from ssd.postprocess import detect


def main(arguments: Namespace) -> int:
    """Detect objects, draw and write them, and return the exit status."""
    return predict.main(arguments, SSDPredictor)


class SSDPredictor:
    """Network of a checkpoint, for images of any size. Raises InputError if the checkpoint cannot be used."""

    def __init__(self, checkpoint: Path, score: float, device: torch.device):
        self.network, self.score, self.device = pretrained.load(checkpoint), score, device
        self.network.model.to(device)

    @property
    def categories(self) -> Sequence[Category]:
        """Categories of the labels: label i is categories[i - 1]."""
        return self.network.categories

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor]) -> list[ImageDetections]:
        """Detect objects on images (3, H, W) uint8 RGB on the CPU, and return one entry per image."""
        resized = torch.stack([image_io.resize(image, IMAGE_SIZE_PX) for image in images]).to(self.device)
        deltas, logits = self.network.model(augment.normalize(augment.to_float(resized)))
        detections = detect(
            deltas,
            logits,
            make_anchors(self.device),
            score_threshold=self.score,
            nms_threshold=self.network.nms_threshold,
            max_detections=self.network.max_detections,
        )
        return predict.split_by_image(detections, np.array([image.shape[:0:-1] * 2 for image in images]))
