"""Export of a trained Mask R-CNN to a file that runs without this program.

    python -m maskrcnn export CHECKPOINT OUT.onnx|OUT.pt2

`maskrcnn/__main__.py` documents inputs and outputs. `detection/evaluation/export.py` writes the file and reads it back.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim

from detection.data import image_io
from detection.evaluation import export
from detection.evaluation.export import ExportJob, ImageOutputs
from maskrcnn import pretrained
from maskrcnn.data import STRIDE_PX, pad_to_batch, resized_hw, stack_sizes
from maskrcnn.export_module import ExportableMaskRCNN
from maskrcnn.model import MaskRCNN

OUTPUTS = ("boxes", "labels", "scores", "masks")
# P6 of smaller images has a side of 1. A dynamic size may not become 1, because that size would broadcast.
MIN_SIDE_PX, MAX_SIDE_PX = 3 * STRIDE_PX, 256 * STRIDE_PX


def main(arguments: Namespace) -> int:
    """Export and verify the network, and return the exit status."""
    return export.main(arguments, prepare)


def prepare(arguments: Namespace) -> ExportJob:
    """Read the network and the images for the verification. Raise InputError if one cannot be used."""
    network = pretrained.load(arguments.checkpoint, arguments.score)
    model, batch_size = network.model, arguments.batch_size
    # Its kernel becomes one operator of ONNX.
    model.config = replace(model.config, roi_align="torchvision")
    images = [
        image_io.resize(image, resized_hw(image.shape[1:], network.min_size_px, network.max_size_px))
        for image in export.read_images(arguments.images)
    ]
    batch = batch_size or 2
    limits = {"min": MIN_SIDE_PX // STRIDE_PX, "max": MAX_SIDE_PX // STRIDE_PX}
    sides = {2: STRIDE_PX * Dim("rows", **limits), 3: STRIDE_PX * Dim("columns", **limits)}
    any_batch = {} if batch_size else {0: Dim("batch")}
    return ExportJob(
        module=ExportableMaskRCNN(model),
        example={
            "images": torch.zeros(batch, 3, 4 * STRIDE_PX, 5 * STRIDE_PX, dtype=torch.uint8),
            "sizes_hw": torch.tensor([[4 * STRIDE_PX, 5 * STRIDE_PX]]).repeat(batch, 1),
        },
        dynamic_shapes={"images": any_batch | sides, "sizes_hw": any_batch},
        outputs=OUTPUTS,
        categories=network.categories,
        score=model.config.score_threshold,
        images=images,
        batch_size=batch_size,
        make_inputs=make_inputs,
        detect=partial(detect_images, model),
    )


def detect_images(model: MaskRCNN, pixels: Tensor, sizes_hw: Tensor) -> list[ImageOutputs]:
    """Return this program's detections on resized and padded images (B, 3, H, W)."""
    boxes, scores, labels, masks = model(pixels, sizes_hw)
    return export.drop_padding([boxes, labels, scores, masks])


def make_inputs(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack images (3, h, w) to inputs of the exported network: pixels (B, 3, H, W) and sizes (B, 2)."""
    pixels = pad_to_batch(images)
    missing = [max(MIN_SIDE_PX - side, 0) for side in pixels.shape[2:]]
    return F.pad(pixels, (0, missing[1], 0, missing[0])).contiguous(), stack_sizes(images)
