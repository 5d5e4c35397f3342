"""Inputs of the reference's vectors: settings and ground truth.

B images, G ground-truth boxes of the image with the most.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detection.data.loader import pad
from detection.evaluation.conformance import ConformanceContext
from retinanet.config import Config, load

NUM_CLASSES = 265  # with the background
NO_CASE = -1  # an image without boxes


class GroundTruth(NamedTuple):
    """Ground truth of a batch: boxes (B, G, 4) in pixels, labels (B, G) from 0, and which are no padding (B, G)."""

    boxes_xyxy: Tensor
    labels: Tensor
    valid: Tensor


def reference_config(*flags: str) -> Config:
    """Return the settings of the reference. Flags change some of them."""
    return load(["--num-classes", str(NUM_CLASSES), *flags], {}).config


def load_gt(context: ConformanceContext, keys: Sequence[str | None]) -> GroundTruth:
    """Read the ground truth of images, whose keys start so; None is an image without boxes."""
    boxes = [context.vector(f"{key}_xyxy") if key else torch.zeros(0, 4, device=context.device) for key in keys]
    labels = [
        context.vector(f"{key}_labels").long() if key else boxes[0].new_zeros(0, dtype=torch.int64) for key in keys
    ]
    return GroundTruth(pad(boxes), pad(labels), pad([torch.ones_like(rows, dtype=torch.bool) for rows in labels]))


def load_cases(context: ConformanceContext, cases: Sequence[int]) -> GroundTruth:
    """Read the ground truth of cases of matching."""
    return load_gt(context, [None if case == NO_CASE else f"match{case}_gt" for case in cases])


def image_hw(context: ConformanceContext, cases: Sequence[int]) -> tuple[int, int]:
    """Return the image size of cases of matching, which have the same."""
    case = next(case for case in cases if case != NO_CASE)
    height, width = context.vectors[f"match{case}_size"].tolist()
    return height, width
