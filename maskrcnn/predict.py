"""Detect on pictures: python -m maskrcnn.predict CHECKPOINT IMAGE... [--folder D] [--score .5]

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
from maskrcnn import pretrained
from maskrcnn.data import lay_out, resized_hw, sizes
from maskrcnn.evaluator import on_original


def main(argv: Sequence[str]) -> int:
    """Detect, draw and write; returns the exit status."""
    return predict.main(argv, predict.Command("maskrcnn", Detector, score=0.5, batch_size=4))


class Detector:
    """The network of a checkpoint, on pictures of any size; raises InputError where the file is of none."""

    def __init__(self, checkpoint: Path, score: float, device: torch.device):
        self.network, self.device = pretrained.load(checkpoint, score), device
        self.network.model.to(device)

    @property
    def categories(self) -> Sequence[Category]:
        """What its labels stand for: label i is categories[i - 1]."""
        return self.network.categories

    def __call__(self, pixels: Sequence[Tensor]) -> list[Seen]:
        """What is seen on each of some images (3, H, W) uint8 RGB, on the CPU.

        Only those of one size go through the network together: padding would change what is seen near the border.
        """
        limits = self.network.min_size_px, self.network.max_size_px
        resized = [image_io.resize(image, resized_hw(image.shape[1:], *limits)) for image in pixels]
        by_size: dict[torch.Size, list[int]] = {}
        for index, image in enumerate(resized):
            by_size.setdefault(image.shape, []).append(index)
        seen: dict[int, Seen] = {}
        for indices in by_size.values():
            originals_hw = [pixels[index].shape[1:] for index in indices]
            seen |= zip(indices, self.detect([resized[index] for index in indices], originals_hw), strict=True)
        return [seen[index] for index in range(len(pixels))]

    @torch.inference_mode()
    def detect(self, resized: Sequence[Tensor], originals_hw: Sequence[torch.Size]) -> list[Seen]:
        """What is seen on images of one size, in pixels of their originals."""
        sizes_hw = sizes(resized)
        detections = self.network.model(lay_out(resized).to(self.device), sizes_hw.to(self.device))
        boxes, scores, labels, masks = (part.cpu().numpy() for part in detections)
        label_ids = np.arange(1 + len(self.categories))
        seen = []
        for image, (size_hw, original_hw) in enumerate(zip(sizes_hw.numpy(), originals_hw, strict=True)):
            rows, of_original = on_original(
                boxes[image],
                scores[image],
                labels[image],
                masks[image],
                size_hw,
                np.int64(image),
                np.array(original_hw),
                category_ids=label_ids,
                legacy=self.network.model.settings.legacy,
            )
            left_top, extents = rows[:, 1:3], rows[:, 3:5]
            boxes_xyxy = np.concatenate([left_top, left_top + extents], axis=1)
            seen.append(Seen(boxes_xyxy, rows[:, 5], rows[:, 6].astype(np.int64), of_original))
        return seen


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
