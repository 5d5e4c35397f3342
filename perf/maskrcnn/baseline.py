"""The plain way of Mask R-CNN: torchvision's model as its documentation trains it, and its reference's evaluator.

float32 and channels first; frozen batch norm as a module of its own; a mask of every class for every region; each
detection's mask laid onto its whole image before it is compressed; COCO's figures by the official library.
tests/perf/test_maskrcnn.py holds that it computes what maskrcnn/ computes with `--variant torchvision`.

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
from maskrcnn import masks
from maskrcnn.backbone import STAGES
from maskrcnn.config import Config
from maskrcnn.data import Batch
from maskrcnn.evaluator import CocoDetections, box_and_mask_metrics, concat

LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
"""torchvision's names, in the order of `maskrcnn.model.LOSSES`."""

LEARNING_RATE = 1e-6  # so that weights that nobody has trained stay what they are, however many steps are timed

# What the last norm of a block of the trunk multiplies by. A trained block adds little to what it is given; at 1 the
# features double sixteen times over, and with them the losses.
RESIDUAL_SCALE = 0.25


class Target(NamedTuple):
    """What torchvision's model is told of a batch: images (3, h, w) float32 from 0 to 1, and what is in each."""

    images: list[Tensor]
    gt: list[dict[str, Tensor]]


class Scene(NamedTuple):
    """Detections of an image in its own pixels: masks (D, S, S) and boxes_xyxy (D, 4) float32, scores (D,)."""

    image_id: int
    size_hw: tuple[int, int]
    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    category_ids: NDArray[np.int64]
    masks: NDArray[np.float32]


def make_model(config: Config) -> Any:
    """torchvision's `maskrcnn_resnet50_fpn` with frozen batch norm, on the CPU, its weights drawn at random.

    That function itself freezes batch norm only together with weights that it fetches. Images come resized, as they
    do to maskrcnn/.
    """
    backbone = resnet_fpn_backbone(
        backbone_name=config.backbone,
        weights=None,
        norm_layer=FrozenBatchNorm2d,
        trainable_layers=len(STAGES) - config.freeze_at,
    )
    for block in backbone.body.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
            last.weight.fill_(RESIDUAL_SCALE)
    return MaskRCNN(
        backbone,
        config.num_classes,
        rpn_pre_nms_top_n_train=config.rpn_pre_nms_top_n,
        rpn_post_nms_top_n_train=config.rpn_post_nms_top_n,
        rpn_batch_size_per_image=config.rpn_batch_size_per_image,
        box_batch_size_per_image=config.box_batch_size_per_image,
        _skip_resize=True,
    )


def to_target(batch: Batch) -> Target:
    """A batch as torchvision takes it: without padding, each mask as a bitmap of its image, (G, h, w) uint8."""
    images, truth = [], []
    for index, (height, width) in enumerate(batch.sizes_hw.tolist()):
        there = batch.labels[index] > 0
        side = max(height, width)
        whole = torch.tensor([0.0, 0.0, side, side], device=batch.edges.device).expand(int(there.sum()), 4)
        bitmaps = masks.rasterize_edges(batch.edges[index, there], whole, side)[:, :height, :width]
        images.append(batch.images[index, :, :height, :width].contiguous() / 255)
        truth.append(
            {
                "boxes": batch.boxes_xyxy[index, there],
                "labels": batch.labels[index, there],
                "masks": bitmaps.to(torch.uint8),
            }
        )
    return Target(images, truth)


def make_step(model: nn.Module, target: Target) -> Callable[[], Tensor]:
    """A step of a model in training, on the device: a function that gives the losses (5,) in the order of `LOSSES`."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)

    def step() -> Tensor:
        losses = model(list(target.images), target.gt)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        return torch.stack([losses[name].detach() for name in LOSSES])

    return step


def paste(probabilities: Tensor, boxes_xyxy: Tensor, size_hw: tuple[int, int]) -> list[CocoRle]:
    """Lay masks (D, S, S) onto their image, each as COCO's compressed run lengths; boxes_xyxy: (D, 4) pixels."""
    whole = (paste_masks_in_image(probabilities[:, None], boxes_xyxy, size_hw) > 0.5).cpu().numpy()
    encoded = [mask_api.encode(np.array(mask[0, :, :, None], dtype=np.uint8, order="F"))[0] for mask in whole]
    return [{"size": list(size_hw), "counts": rle["counts"].decode()} for rle in encoded]


def paste_scene(scene: Scene, device: torch.device) -> list[CocoRle]:
    """The same of made-up detections."""
    probabilities, boxes_xyxy = (torch.from_numpy(part).to(device) for part in (scene.masks, scene.boxes_xyxy))
    return paste(probabilities, boxes_xyxy, scene.size_hw)


def evaluate(scenes: Sequence[Scene], metric: CocoMaskMetric, device: torch.device) -> dict[str, float]:
    """COCO's figures of the detections of many images, for boxes and for masks, which are laid on by the device."""
    return box_and_mask_metrics(metric, concat([detections_of(scene, device) for scene in scenes]))


def detections_of(scene: Scene, device: torch.device) -> CocoDetections:
    """The detections of an image as the metric takes them."""
    low, high = np.split(scene.boxes_xyxy.astype(np.float64), 2, axis=1)
    ids = np.full(len(low), scene.image_id)
    rows = np.column_stack([ids, low, high - low, scene.scores, scene.category_ids])
    return CocoDetections(rows, paste_scene(scene, device))
