"""Baseline of RetinaNet: torchvision's detector, assembled as the MLPerf reference does.

float32 and channels first. Frozen batch norm is a separate module, detections are found image by image and level by
level, and the metric is pycocotools. tests/perf/test_retinanet.py verifies that the results equal those of retinanet/.

B images, A_l anchors of level l.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detection.evaluation.coco_metric import CocoBoxMetric
from detection.nn.resnet_fpn import NUM_CHANNELS, STAGES
from perf.maskrcnn.baseline import ModelInput, damp_residuals
from retinanet.anchors import OCTAVE_SCALES, RATIOS
from retinanet.config import Config
from retinanet.data import Batch
from retinanet.model import HeadOutputs

LOSSES = ("classification", "bbox_regression")
"""torchvision's names, in the order of `retinanet.loss.LOSS_NAMES`."""


class HeadInput(NamedTuple):
    """Ground truth of each image in torchvision's format, and the anchors (A_l, 4) of each level."""

    gt: list[dict[str, Tensor]]
    anchors: Sequence[Tensor]


def make_model(config: Config) -> Any:
    """Return torchvision's detector with frozen batch norm and random weights, on the CPU."""
    backbone = resnet_fpn_backbone(
        backbone_name=config.backbone,
        weights=None,
        norm_layer=FrozenBatchNorm2d,
        trainable_layers=len(STAGES) - config.freeze_at,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(NUM_CHANNELS, NUM_CHANNELS),
    )
    damp_residuals(backbone.body)
    sizes = tuple(tuple(int(size * scale) for scale in OCTAVE_SCALES) for size in config.anchor_sizes)
    side = config.image_size
    return RetinaNet(
        backbone,
        config.num_outputs,
        anchor_generator=AnchorGenerator(sizes, (RATIOS,) * len(sizes)),
        fixed_size=(side, side),
    )


def to_model_input(batch: Batch) -> ModelInput:
    """Convert a batch to torchvision's format: images without padding."""
    images, gt = [], []
    for index, (height, width) in enumerate(batch.sizes_hw.tolist()):
        is_box = batch.labels[index] > 0
        images.append(batch.images[index, :, :height, :width].contiguous() / 255)
        gt.append({"boxes": batch.boxes_xyxy[index, is_box], "labels": batch.labels[index, is_box] - 1})
    return ModelInput(images, gt)


def head_loss(model: Any, outputs: HeadOutputs, head_input: HeadInput) -> Tensor:
    """Return the losses (2,) of the heads' outputs."""
    by_name = {"cls_logits": torch.cat(outputs.logits, dim=1), "bbox_regression": torch.cat(outputs.deltas, dim=1)}
    losses = model.compute_loss(head_input.gt, by_name, [torch.cat(list(head_input.anchors))] * len(head_input.gt))
    return torch.stack([losses[name] for name in LOSSES])


def detect(model: Any, outputs: HeadOutputs, anchors: Sequence[Tensor], size_px: int) -> list[dict[str, Tensor]]:
    """Return boxes, scores and labels of each image."""
    num_images = len(outputs.logits[0])
    by_name = {"cls_logits": outputs.logits, "bbox_regression": outputs.deltas}
    detections: list[dict[str, Tensor]] = model.postprocess_detections(
        by_name, [list(anchors)] * num_images, [(size_px, size_px)] * num_images
    )
    return detections


def evaluate(
    detections: Sequence[dict[str, Tensor]], scales_wh: Sequence[Tensor], metric: CocoBoxMetric
) -> dict[str, float]:
    """Return COCO's metrics of the detections of each image, whose boxes are multiplied by its scales_wh (2,)."""
    rows = []
    for index, (image, scale_wh) in enumerate(zip(detections, scales_wh, strict=True)):
        low, high = (image["boxes"].cpu() * scale_wh.repeat(2)).double().split(2, dim=1)
        columns = [torch.full((len(low), 1), index), low, high - low]
        columns += [image["scores"].cpu()[:, None], 1 + image["labels"].cpu()[:, None]]
        rows.append(torch.cat(columns, dim=1).numpy())
    return metric(np.concatenate(rows))
