"""Export of a trained SSD300 to a file that runs without this program.

    python -m ssd export CHECKPOINT OUT.onnx|OUT.pt2

`ssd/__main__.py` documents input and outputs. `detection/evaluation/export.py` writes the file and reads it back.
"""

from argparse import Namespace
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from detection.data import image_io
from detection.evaluation import export
from detection.evaluation.export import Comparison, ExportedNetwork, ExportJob
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
        verify=partial(verify_export, network, score, images, batch_size),
    )


@torch.inference_mode()
def verify_export(
    network: TrainedModel, score: float, images: Sequence[Tensor], batch_size: int, exported: ExportedNetwork
) -> str:
    """Compare the exported network's detections with this program's, and summarize. Raise InputError on a mismatch."""
    comparison = Comparison()
    for batch, num_images in export.make_batches(images, batch_size):
        pixels = torch.stack(batch)
        deltas, logits = network.model(augment.normalize(augment.to_float(pixels)))
        expected = detect(
            deltas,
            logits,
            make_anchors(),
            score_threshold=score,
            nms_threshold=network.nms_threshold,
            max_detections=network.max_detections,
        )
        boxes, labels, scores = exported(pixels)
        for index in range(num_images):
            in_image, valid = expected.batch_index == index, scores[index] > 0
            comparison.add(
                expected.labels[in_image],
                torch.cat([expected.boxes_xyxy[in_image], expected.scores[in_image, None]], dim=1),
                labels[index, valid],
                torch.cat([boxes[index, valid], scores[index, valid, None]], dim=1),
            )
    return comparison.summarize(score)
