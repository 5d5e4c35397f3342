"""Mask R-CNN: backbone, region proposals, box head, mask head, and the five losses.

B images, G ground-truth boxes of the image with the most, R ROIs of all images, K classes with background 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision import ops

from detection.nn import box_coder, matcher
from detection.runtime.device import device_constant
from maskrcnn import loss, masks, rpn
from maskrcnn.anchors import STRIDES_PX
from maskrcnn.backbone import make_backbone, normalize
from maskrcnn.config import Config
from maskrcnn.postprocess import Detections, select_detections
from maskrcnn.roi_align import Rois, flatten_rois, roi_align
from maskrcnn.roi_heads import BOX_POOL_SIZE, MASK_POOL_SIZE, MASK_SIZE, BoxHead, MaskHead
from maskrcnn.rpn import RPN

LOSS_NAMES = ("objectness", "rpn_box", "classifier", "box", "mask")
POOLED_STRIDES_PX = STRIDES_PX[:4]  # P6 serves the RPN only


def make_model(config: Config) -> "MaskRCNN":
    """Build the model with random weights; `config.num_classes` must be resolved."""
    return MaskRCNN(config)


class Targets(NamedTuple):
    """Ground truth of a batch, as in `data.Batch`."""

    boxes_xyxy: Tensor
    labels: Tensor
    vertices: Tensor
    seeds: Tensor


class MaskRCNN(nn.Module):
    """Mask R-CNN: computes the losses if targets are given, detections otherwise."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.backbone = make_backbone(config)
        self.rpn = RPN(config)
        self.box_head = BoxHead(config.num_classes)
        self.mask_head = MaskHead(config.num_classes, zero_biases=config.zero_mask_biases)

    def compile(self, *args: object, **kwargs: object) -> None:
        """Compile the parts without data-dependent shapes: the whole model would break into some fifty graphs."""
        for part in (self.backbone, self.rpn, self.box_head, self.mask_head):
            part.compile(*args, dynamic=True, **kwargs)

    def forward(self, images: Tensor, sizes_hw: Tensor, targets: Targets | None = None) -> Tensor | Detections:
        """Return the losses (5,) of `LOSS_NAMES` if targets are given, detections otherwise.

        images: (B, 3, H, W) uint8, padded. sizes_hw: (B, 2) without the padding. Each loss is a mean over the batch,
        as the reference computes it on a rank.
        """
        features = self.backbone(normalize(images, sizes_hw, self.config.input_format))
        logits, deltas = self.rpn(features)
        anchors = self.rpn.anchors(images)
        proposals = rpn.generate_proposals(
            logits.detach(), deltas.detach(), anchors, images, sizes_hw, self.config, training=targets is not None
        )
        if targets is None:
            return self.detect(features[:4], proposals, sizes_hw)
        num_candidates = proposals.valid.shape[1] + targets.labels.shape[1]
        anchor_priority = matcher.hash_uniform(targets.seeds, len(anchors))
        roi_priority = matcher.hash_uniform(targets.seeds + 1, num_candidates)
        return torch.stack(
            [
                *self.rpn_losses(logits, deltas, anchors, sizes_hw, targets, anchor_priority),
                *self.head_losses(features[:4], proposals, images, targets, roi_priority),
            ]
        )

    def rpn_losses(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, sizes_hw: Tensor, targets: Targets, priority: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the objectness and box losses of the anchors, (). priority: (B, A) for `matcher.sample_pos_neg`."""
        config, legacy = self.config, self.config.legacy_boxes
        with torch.no_grad():
            matched, match_labels = rpn.assign_targets(
                anchors,
                targets.boxes_xyxy,
                targets.labels > 0,
                sizes_hw,
                drop_straddling=config.drop_straddling,
                legacy=legacy,
            )
            sampled, is_sampled = matcher.sample_pos_neg(
                match_labels, priority, config.rpn_batch_size_per_image, config.rpn_positive_fraction
            )
        return rpn.rpn_loss(
            logits, deltas, anchors, targets.boxes_xyxy, matched, sampled, is_sampled, match_labels, legacy=legacy
        )

    def head_losses(
        self, features: list[Tensor], proposals: rpn.Proposals, images: Tensor, targets: Targets, priority: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the class, box and mask losses, (). priority: (B, P + G) as for `loss.sample_rois`."""
        config = self.config
        with torch.no_grad():
            rois, matched, labels = loss.sample_rois(proposals, targets.boxes_xyxy, targets.labels, priority, config)
        # Waits for the device, idle since NMS. The mask head of all ROIs that might be positive would take longer.
        positives = (labels > 0).nonzero()[:, 0]
        logits, deltas = self.box_head(self.roi_pool(features, rois, BOX_POOL_SIZE))
        gt_index = rois.batch_index[positives], matched[positives]
        positive_rois = Rois(rois.boxes_xyxy[positives], rois.batch_index[positives])
        target_deltas = box_coder.encode(
            targets.boxes_xyxy[gt_index],
            positive_rois.boxes_xyxy,
            box_coder.BOX_HEAD_WEIGHTS,
            legacy=config.legacy_boxes,
        )
        class_loss, box_loss = loss.box_losses(
            logits, deltas, labels, positives, target_deltas, config.box_smooth_l1_beta
        )

        with torch.no_grad():
            vertices = targets.vertices[gt_index]
            mask_targets = (
                self.roi_align_masks(vertices, positive_rois, images)
                if config.mask_targets == "roi-align"
                else masks.rasterize_polygons(vertices, positive_rois.boxes_xyxy, MASK_SIZE)
            )
        mask_loss = self.mask_loss(features, positive_rois, labels[positives], mask_targets.float())
        return class_loss, box_loss, mask_loss

    def mask_loss(self, features: list[Tensor], rois: Rois, labels: Tensor, mask_targets: Tensor) -> Tensor:
        """Return the binary cross-entropy of the masks, (); without positive ROIs, 0 that still uses every weight."""
        if not len(labels):
            dummy_index = labels.new_zeros(2)  # a single ROI would compile the head once more
            dummy_rois = Rois(mask_targets.new_ones(2, 4), dummy_index)
            logits = self.mask_head(self.roi_pool(features, dummy_rois, MASK_POOL_SIZE), dummy_index)
            return logits.sum() * 0.0
        logits = self.mask_head(self.roi_pool(features, rois, MASK_POOL_SIZE), labels)
        return loss.mask_loss(logits, mask_targets)

    def roi_align_masks(self, vertices: Tensor, rois: Rois, images: Tensor) -> Tensor:
        """Sample whole bitmaps with RoIAlign, as torchvision does: masks (R, 28, 28), between 0 and 1 at the border."""
        side = max(images.shape[2:])
        whole = device_constant((0, 0, side, side), vertices.device).expand(len(vertices), 4)
        bitmaps = masks.rasterize_polygons(vertices, whole, side)[:, None]
        indices = torch.arange(len(vertices), device=vertices.device)[:, None].to(vertices)
        return ops.roi_align(bitmaps, torch.cat([indices, rois.boxes_xyxy], dim=1), (MASK_SIZE, MASK_SIZE))[:, 0]

    def roi_pool(self, features: list[Tensor], rois: Rois, size: int) -> Tensor:
        """Pool the ROIs (R, 256, size, size) from the four finest levels of the pyramid."""
        return roi_align(
            features,
            rois,
            size,
            strides_px=POOLED_STRIDES_PX,
            legacy=self.config.legacy_boxes,
            method=self.config.roi_align,
        )

    def detect(self, features: list[Tensor], proposals: rpn.Proposals, sizes_hw: Tensor) -> Detections:
        """Return the detections of each image, with their masks."""
        shape = proposals.valid.shape
        logits, deltas = self.box_head(self.roi_pool(features, flatten_rois(proposals.boxes_xyxy), BOX_POOL_SIZE))
        boxes_xyxy, scores, labels = select_detections(
            logits.unflatten(0, shape), deltas.unflatten(0, shape), proposals, sizes_hw, self.config
        )
        image, slot = (labels > 0).nonzero(as_tuple=True)
        probabilities = boxes_xyxy.new_zeros(*labels.shape, MASK_SIZE, MASK_SIZE)
        if len(image):
            pooled = self.roi_pool(features, Rois(boxes_xyxy[image, slot], image), MASK_POOL_SIZE)
            probabilities[image, slot] = self.mask_head(pooled, labels[image, slot]).sigmoid()
        return Detections(boxes_xyxy, scores, labels, probabilities)
