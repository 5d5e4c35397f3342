"""Export of a trained RetinaNet to a file that runs without this program.

    python -m retinanet export CHECKPOINT OUT.onnx|OUT.pt2

`retinanet/__main__.py` documents inputs and outputs. `detection/evaluation/export.py` writes the file and reads it
back.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.export import Dim

from detection.data import image_io
from detection.evaluation import export
from detection.evaluation.export import ExportJob, ImageOutputs
from detection.runtime.distributed import DistContext
from retinanet import pretrained
from retinanet.data import EvalBatch
from retinanet.evaluator import RetinaNetEvaluator
from retinanet.export_module import ExportableRetinaNet
from retinanet.model import RetinaNet

OUTPUTS = ("boxes", "labels", "scores")


def main(arguments: Namespace) -> int:
    """Export and verify the network, and return the exit status."""
    return export.main(arguments, prepare)


def prepare(arguments: Namespace) -> ExportJob:
    """Read the network and the images for the verification. Raise InputError if one cannot be used."""
    network = pretrained.load(arguments.checkpoint)
    model, config, batch_size = network.model, network.config, arguments.batch_size
    if arguments.score is not None:
        config = replace(config, score_threshold=arguments.score)
    batch = batch_size or 2
    any_batch = {} if batch_size else {0: Dim("batch")}
    return ExportJob(
        module=ExportableRetinaNet(model, config),
        example={
            "images": torch.zeros(batch, 3, 30, 40, dtype=torch.uint8),
            "sizes_hw": torch.tensor([[30, 40]]).repeat(batch, 1),
        },
        dynamic_shapes={"images": any_batch | {2: Dim("rows"), 3: Dim("columns")}, "sizes_hw": any_batch},
        outputs=OUTPUTS,
        categories=network.categories,
        score=config.score_threshold,
        images=export.read_images(arguments.images),
        batch_size=batch_size,
        make_inputs=make_inputs,
        detect=partial(detect_images, model, RetinaNetEvaluator(config, DistContext(0, 1, torch.device("cpu")))),
    )


def make_inputs(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack images (3, h, w) to inputs of the exported network: pixels (B, 3, H, W) and sizes (B, 2)."""
    return image_io.pad_to_batch(images).contiguous(), torch.tensor([image.shape[1:] for image in images])


def detect_images(
    model: RetinaNet, evaluator: RetinaNetEvaluator, pixels: Tensor, sizes_hw: Tensor
) -> list[ImageOutputs]:
    """Return this program's detections on images (B, 3, H, W), in their pixels."""
    batch = EvalBatch(pixels, sizes_hw, torch.arange(len(pixels)))
    detections = evaluator.predict(model, batch)
    scales = evaluator.scales_wh(batch).repeat(1, 2)[detections.batch_index]
    return export.split_by_image(detections._replace(boxes_xyxy=detections.boxes_xyxy * scales), len(pixels))
