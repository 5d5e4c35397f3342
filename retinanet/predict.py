"""Detection on image files, with the network of a checkpoint.

    python -m retinanet predict CHECKPOINT IMAGE... [--folder D] [--score 0.3]

detection/evaluation/predict.py describes the input and output.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from detection.data import image_io
from detection.data.coco import Category
from detection.evaluation import predict
from detection.evaluation.predict import ImageDetections
from retinanet import pretrained
from retinanet.anchors import make_anchors
from retinanet.postprocess import detect
from retinanet.resize import normalize_and_resize


def main(arguments: Namespace) -> int:
    """Detect objects, draw and write them, and return the exit status."""
    return predict.main(arguments, RetinaNetPredictor)


class RetinaNetPredictor:
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
        config = self.network.config
        size = config.image_size
        sizes_hw = torch.tensor([image.shape[1:] for image in images])
        batch = image_io.pad_to_batch(images).to(self.device)
        outputs = self.network.model(normalize_and_resize(batch, sizes_hw.to(self.device), None, size))
        detections = detect(
            outputs,
            make_anchors(size, size, self.device, config.anchor_sizes),
            (size, size),
            score_threshold=self.score,
            nms_threshold=config.nms_threshold,
            pre_nms_top_n=config.pre_nms_top_n,
            max_detections=config.max_detections,
        )
        return predict.split_by_image(detections, sizes_hw.flip(1).repeat(1, 2).numpy() / size)
