"""Export of a trained SSD300 to a file that runs without this program.

    python -m ssd export CHECKPOINT OUT.onnx|OUT.pt2

`ssd/__main__.py` documents input and outputs. `detection/evaluation/export.py` writes the file and reads it back.
"""

from argparse import Namespace
from functools import partial

import torch
from torch import Tensor

from detection.data import image_io
from detection.evaluation import export
from detection.evaluation.export import ExportJob, ImageOutputs
from ssd import augment, pretrained
from ssd.anchors import IMAGE_SIZE_PX, make_anchors
from ssd.export_module import ExportableSSD
from ssd.postprocess import detect
from ssd.pretrained import TrainedModel

OUTPUTS = ("boxes", "labels", "scores")


def main(arguments: Namespace) -> int:
    """Export and verify the network, and return the exit status."""
    return export.main(arguments, prepare)


def prepare(arguments: Namespace) -> ExportJob:
    """Read the network and the images for the verification. Raise InputError if one cannot be used."""
    network = pretrained.load(arguments.checkpoint)
    images = [image_io.resize(image, IMAGE_SIZE_PX) for image in export.read_images(arguments.images)]
    score = network.score_threshold if arguments.score is None else arguments.score
    batch_size = arguments.batch_size
    return ExportJob(
        module=ExportableSSD(
            network.model,
            score_threshold=score,
            nms_threshold=network.nms_threshold,
            max_detections=network.max_detections,
        ),
        example={"images": torch.zeros(batch_size or 2, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX, dtype=torch.uint8)},
        dynamic_shapes={"images": None if batch_size else {0: torch.export.Dim("batch")}},
        outputs=OUTPUTS,
        categories=network.categories,
        score=score,
        images=images,
        batch_size=batch_size,
        make_inputs=lambda batch: (torch.stack(list(batch)),),
        detect=partial(detect_images, network, score),
        boxes_in_pixels=False,
    )


def detect_images(network: TrainedModel, score: float, images: Tensor) -> list[ImageOutputs]:
    """Return this program's detections on images (B, 3, 300, 300)."""
    deltas, logits = network.model(augment.normalize(augment.to_float(images)))
    detections = detect(
        deltas,
        logits,
        make_anchors(),
        score_threshold=score,
        nms_threshold=network.nms_threshold,
        max_detections=network.max_detections,
    )
    return export.split_by_image(detections, len(images))
