"""Baseline of Mask R-CNN: torchvision's model as its documentation trains it, and its reference's evaluator.

float32 and channels first. Frozen batch norm is a separate module. The mask head computes masks of all classes. Each
detected mask is pasted into a full image before compression, and the metric is pycocotools.
tests/perf/test_maskrcnn.py verifies that the results equal those of maskrcnn/ with `--variant torchvision`.

B images, G ground-truth boxes of one image, D detections of one image, S side of a mask (28).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as mask_api
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from detection.data.rle import CocoRle
from detection.evaluation.coco_metric import CocoMaskMetric
from detection.nn.resnet_fpn import STAGES
from maskrcnn import masks
from maskrcnn.config import Config
from maskrcnn.data import Batch
from maskrcnn.evaluator import CocoDetections, box_and_mask_metrics, concat

LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
"""torchvision's names, in the order of `maskrcnn.model.LOSSES`."""

LEARNING_RATE = 1e-6  # so small that the random weights hardly change, however many steps are timed

# Factor of the last norm of each residual block. A trained block adds little to its input. At 1, the features of random
# weights double sixteen times, and the losses with them.
RESIDUAL_SCALE = 0.25


class ModelInput(NamedTuple):
    """Inputs of torchvision's model: images (3, h, w) float32 from 0 to 1, and ground truth of each."""

    images: list[Tensor]
    gt: list[dict[str, Tensor]]


class Scene(NamedTuple):
    """Detections of an image, in its pixels: masks (D, S, S) and boxes_xyxy (D, 4) float32, scores (D,)."""

    image_index: int
    size_hw: tuple[int, int]
    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: NDArray[np.float32]


def make_model(config: Config) -> Any:
    """Return torchvision's `maskrcnn_resnet50_fpn` with frozen batch norm and random weights, on the CPU.

    torchvision's own function freezes batch norm only together with downloaded weights. Images are already resized, as
    for maskrcnn/.
    """
    backbone = resnet_fpn_backbone(
        backbone_name=config.backbone,
        weights=None,
        norm_layer=FrozenBatchNorm2d,
        trainable_layers=len(STAGES) - config.freeze_at,
    )
    damp_residuals(backbone.body)
    return MaskRCNN(
        backbone,
        config.num_classes,
        rpn_pre_nms_top_n_train=config.rpn_pre_nms_top_n,
        rpn_post_nms_top_n_train=config.rpn_post_nms_top_n_per_image,
        rpn_batch_size_per_image=config.rpn_batch_size_per_image,
        box_batch_size_per_image=config.box_batch_size_per_image,
        _skip_resize=True,
    )


def damp_residuals(body: nn.Module) -> None:
    """Set the last, frozen norm of each residual block to `RESIDUAL_SCALE`."""
    for block in body.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            last_norm = block.bn3 if isinstance(block, Bottleneck) else block.bn2
            last_norm.weight.fill_(RESIDUAL_SCALE)


def to_model_input(batch: Batch) -> ModelInput:
    """Convert a batch to torchvision's format: no padding, each mask a bitmap of its image, (G, h, w) uint8."""
    images, gt = [], []
    for index, (height, width) in enumerate(batch.sizes_hw.tolist()):
        is_box = batch.labels[index] > 0
        side = max(height, width)
        square = torch.tensor([0.0, 0.0, side, side], device=batch.vertices.device).expand(int(is_box.sum()), 4)
        bitmaps = masks.rasterize_polygons(batch.vertices[index, is_box], square, side)[:, :height, :width]
        images.append(batch.images[index, :, :height, :width].contiguous() / 255)
        gt.append(
            {
                "boxes": batch.boxes_xyxy[index, is_box],
                "labels": batch.labels[index, is_box],
                "masks": bitmaps.to(torch.uint8),
            }
        )
    return ModelInput(images, gt)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are not frozen."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_step(
    model: nn.Module, model_input: ModelInput, optimizer: torch.optim.Optimizer, loss_names: Sequence[str]
) -> Callable[[], Tensor]:
    """Return a training step of torchvision's detector on the device. It returns the losses in the order of names."""

    def step() -> Tensor:
        losses = model(list(model_input.images), model_input.gt)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        return torch.stack([losses[name].detach() for name in loss_names])

    return step


def paste(probabilities: Tensor, boxes_xyxy: Tensor, size_hw: tuple[int, int]) -> list[CocoRle]:
    """Paste masks (D, S, S) into full images and return them as COCO's compressed RLE. boxes_xyxy: (D, 4) pixels."""
    bitmaps = (paste_masks_in_image(probabilities[:, None], boxes_xyxy, size_hw) > 0.5).cpu().numpy()
    encoded = [mask_api.encode(np.array(mask[0, :, :, None], dtype=np.uint8, order="F"))[0] for mask in bitmaps]
    return [{"size": list(size_hw), "counts": rle["counts"].decode()} for rle in encoded]


def paste_scene(scene: Scene, device: torch.device) -> list[CocoRle]:
    """Paste the masks of a scene on `device`."""
    probabilities, boxes_xyxy = (torch.from_numpy(array).to(device) for array in (scene.masks, scene.boxes_xyxy))
    return paste(probabilities, boxes_xyxy, scene.size_hw)


def evaluate(scenes: Sequence[Scene], metric: CocoMaskMetric, device: torch.device) -> dict[str, float]:
    """Return the COCO metrics of the scenes for boxes and masks, with masks pasted on `device`."""
    return box_and_mask_metrics(metric, concat([to_coco(scene, device) for scene in scenes]))


def to_coco(scene: Scene, device: torch.device) -> CocoDetections:
    """Convert the detections of a scene to the format of the metric."""
    low, high = np.split(scene.boxes_xyxy.astype(np.float64), 2, axis=1)
    indices = np.full(len(low), scene.image_index)
    rows = np.column_stack([indices, low, high - low, scene.scores, scene.labels])
    return CocoDetections(rows, paste_scene(scene, device))
