"""Detection on images.

    python -m maskrcnn predict CHECKPOINT IMAGE... [--folder D] [--score 0.5]

`detection/arguments.py` documents inputs and outputs.
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
from maskrcnn import pretrained
from maskrcnn.data import pad_to_batch, resized_hw, stack_sizes
from maskrcnn.evaluator import to_original_scale


def main(arguments: Namespace) -> int:
    """Detect, draw and write; return the exit status."""
    return predict.main(arguments, MaskRCNNPredictor)


class MaskRCNNPredictor:
    """Network of a checkpoint, for images of any size. Raises InputError if the file cannot be used."""

    def __init__(self, checkpoint: Path, score: float, device: torch.device):
        self.trained, self.device = pretrained.load(checkpoint, score), device
        self.trained.model.to(device).to(memory_format=torch.channels_last)

    @property
    def categories(self) -> Sequence[Category]:
        """Categories of the labels: label i is categories[i - 1]."""
        return self.trained.categories

    def __call__(self, images: Sequence[Tensor]) -> list[ImageDetections]:
        """Return the detections of each image (3, H, W) uint8 RGB, on the CPU.

        Batches hold images of one size only: padding would change detections near the border.
        """
        limits = self.trained.min_size_px, self.trained.max_size_px
        resized = [image_io.resize(image, resized_hw(image.shape[1:], *limits)) for image in images]
        by_size: dict[torch.Size, list[int]] = {}
        for index, image in enumerate(resized):
            by_size.setdefault(image.shape, []).append(index)
        results: dict[int, ImageDetections] = {}
        for indices in by_size.values():
            originals_hw = [images[index].shape[1:] for index in indices]
            batch = self.predict_same_size([resized[index] for index in indices], originals_hw)
            results |= zip(indices, batch, strict=True)
        return [results[index] for index in range(len(images))]

    @torch.inference_mode()
    def predict_same_size(self, resized: Sequence[Tensor], originals_hw: Sequence[torch.Size]) -> list[ImageDetections]:
        """Return the detections of images of one size, in pixels of the original images."""
        sizes_hw = stack_sizes(resized)
        detections = self.trained.model(pad_to_batch(resized).to(self.device), sizes_hw.to(self.device))
        boxes, scores, labels, masks = (part.cpu().numpy() for part in detections)
        results = []
        for image, (size_hw, original_hw) in enumerate(zip(sizes_hw.numpy(), originals_hw, strict=True)):
            rows, original_masks = to_original_scale(
                boxes[image],
                scores[image],
                labels[image],
                masks[image],
                size_hw,
                np.int64(image),
                np.array(original_hw),
                legacy=self.trained.model.config.legacy_boxes,
            )
            left_top, extents = rows[:, 1:3], rows[:, 3:5]
            boxes_xyxy = np.concatenate([left_top, left_top + extents], axis=1)
            results.append(ImageDetections(boxes_xyxy, rows[:, 5], rows[:, 6].astype(np.int64), original_masks))
        return results
