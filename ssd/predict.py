"""Detect on pictures: python -m ssd.predict CHECKPOINT IMAGE... [--folder D] [--score .3]

What it reads and writes is said in `detection/evaluation/predict.py`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detection.data import image_io
from detection.data.coco import Category
from detection.evaluation import predict
from detection.evaluation.predict import Seen
from ssd import augment, pretrained
from ssd.anchors import IMAGE_SIZE_PX, make_anchors
from ssd.postprocess import detect


def main(argv: Sequence[str]) -> int:
    """Detect, draw and write; returns the exit status."""
    return predict.main(argv, predict.Command("ssd", Detector, score=0.3, batch_size=8))


class Detector:
    """The network of a checkpoint, on pictures of any size; raises InputError where the file is of none."""

    def __init__(self, checkpoint: Path, score: float, device: torch.device):
        self.network, self.score, self.device = pretrained.load(checkpoint), score, device
        self.network.model.to(device)

    @property
    def categories(self) -> Sequence[Category]:
        """What its labels stand for: label i is categories[i - 1]."""
        return self.network.categories

    @torch.inference_mode()
    def __call__(self, pixels: Sequence[Tensor]) -> list[Seen]:
        """What is seen on each of some images (3, H, W) uint8 RGB, on the CPU."""
        resized = torch.stack([image_io.resize(image, IMAGE_SIZE_PX) for image in pixels]).to(self.device)
        deltas, logits = self.network.model(augment.normalise(augment.to_unit(resized)))
        detections = detect(
            deltas,
            logits,
            make_anchors(self.device),
            score_threshold=self.score,
            nms_threshold=self.network.nms_threshold,
            max_detections=self.network.max_detections,
        )
        of_image, boxes, labels, scores = (part.cpu().numpy() for part in detections)
        sizes_whwh = [image.shape[:0:-1] * 2 for image in pixels]
        return [
            Seen(boxes[rows] * np.array(size), scores[rows], labels[rows])
            for rows, size in zip((of_image == index for index in range(len(pixels))), sizes_whwh, strict=True)
        ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
