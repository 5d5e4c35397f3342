"""Mask R-CNN: trunk, region proposals, box head, mask head, and the five losses between them.

B images, G ground-truth boxes of the fullest image, R regions of all images together, K classes with background 0.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import ops

from detection.runtime.device import constant
from maskrcnn import box_coder, masks, matcher, rpn
from maskrcnn.anchors import SIZES_PX, STRIDES_PX
from maskrcnn.backbone import Pixels, Trunk, normalise
from maskrcnn.config import Config
from maskrcnn.postprocess import Detections
from maskrcnn.roi_align import roi_align
from maskrcnn.roi_heads import BOX_CELLS, MASK_CELLS, MASK_SIZE, BoxHead, MaskHead
from maskrcnn.rpn import ProposalSettings, RegionProposals

LOSSES = ("objectness", "rpn_box", "classifier", "box", "mask")
POSITIVE_IOU = 0.5
MIN_DETECTION_PX = 1e-2
POOLED_STRIDES_PX = STRIDES_PX[:4]  # P6 is for proposals alone


@dataclass(frozen=True)
class Settings:
    """What the model is beside its weights; `config` has the help of each.

    legacy: boxes include their last pixel.
    """

    trunk: str
    stride_in_1x1: bool
    freeze_at: int
    batch_norm_eps: float
    pixels: Pixels
    legacy: bool
    num_classes: int
    drop_straddling: bool
    proposals_per_batch: bool
    rpn_pre_nms_top_n: int
    rpn_pre_nms_top_n_eval: int
    rpn_post_nms_top_n: int
    rpn_post_nms_top_n_eval: int
    rpn_nms_threshold: float
    rpn_batch_size_per_image: int
    rpn_positive_fraction: float
    box_batch_size_per_image: int
    box_positive_fraction: float
    box_smooth_l1_beta: float
    soft_masks: bool
    score_threshold: float
    nms_threshold: float
    max_detections: int
    anchor_sizes_px: tuple[int, ...] = SIZES_PX


def make_model(config: Config) -> "MaskRCNN":
    """The model of the settings, with weights drawn at random; num_classes is known."""
    return MaskRCNN(
        Settings(
            trunk=config.backbone,
            stride_in_1x1=config.stride_in_1x1,
            freeze_at=config.freeze_at,
            batch_norm_eps=config.batch_norm_eps,
            pixels=config.input_format,
            legacy=config.legacy_boxes,
            num_classes=config.num_classes,
            drop_straddling=config.drop_straddling,
            proposals_per_batch=config.proposals_per_batch,
            rpn_pre_nms_top_n=config.rpn_pre_nms_top_n,
            rpn_pre_nms_top_n_eval=config.rpn_pre_nms_top_n_eval,
            rpn_post_nms_top_n=config.rpn_post_nms_top_n,
            rpn_post_nms_top_n_eval=config.rpn_post_nms_top_n_eval,
            rpn_nms_threshold=config.rpn_nms_threshold,
            rpn_batch_size_per_image=config.rpn_batch_size_per_image,
            rpn_positive_fraction=config.rpn_positive_fraction,
            box_batch_size_per_image=config.box_batch_size_per_image,
            box_positive_fraction=config.box_positive_fraction,
            box_smooth_l1_beta=config.box_smooth_l1_beta,
            soft_masks=config.mask_targets == "roi-align",
            score_threshold=config.score_threshold,
            nms_threshold=config.nms_threshold,
            max_detections=config.max_detections,
            anchor_sizes_px=config.anchor_sizes,
        )
    )


class Truth(NamedTuple):
    """What is in the images of a batch: as in `data.Batch`."""

    boxes_xyxy: Tensor
    labels: Tensor
    edges: Tensor
    seeds: Tensor


class Regions(NamedTuple):
    """Regions of all images: boxes_xyxy (R, 4) pixels, images (R,) their numbers in the batch."""

    boxes_xyxy: Tensor
    images: Tensor


class MaskRCNN(nn.Module):
    """Trains on what it is told of images, and detects where it is told nothing."""

    def __init__(self, settings: Settings):
        super().__init__()
        self.settings = settings
        self.backbone = Trunk(
            settings.trunk,
            stride_in_1x1=settings.stride_in_1x1,
            freeze_at=settings.freeze_at,
            batch_norm_eps=settings.batch_norm_eps,
        )
        self.rpn = RegionProposals(legacy=settings.legacy, sizes_px=settings.anchor_sizes_px)
        self.box_head = BoxHead(settings.num_classes)
        self.mask_head = MaskHead(settings.num_classes)

    def compile(self, *args: object, **kwargs: object) -> None:
        """Compile what has no shapes that depend on the data: as a whole it would break into some fifty graphs."""
        for part in (self.backbone, self.rpn, self.box_head, self.mask_head):
            part.compile(*args, dynamic=True, **kwargs)

    def forward(self, images: Tensor, sizes_hw: Tensor, truth: Truth | None = None) -> Tensor | Detections:
        """The five losses (5,) of images (B, 3, H, W) uint8 with sizes_hw (B, 2) inside, in the order of `LOSSES`.

        Each is a mean over the batch, as the reference computes them on a rank. Without truth: what is detected.
        """
        pixels = normalise(images, sizes_hw, self.settings.pixels)
        features = self.backbone(pixels)
        logits, deltas = self.rpn(features)
        anchors = self.rpn.anchors(images)
        settings = self.proposal_settings(training=truth is not None)
        proposals = rpn.propose(logits.detach(), deltas.detach(), anchors, images, sizes_hw, settings)
        if truth is None:
            return self.detect(features[:4], proposals, sizes_hw)
        return torch.stack(
            [
                *self.rpn_losses(logits, deltas, anchors, sizes_hw, truth),
                *self.head_losses(features[:4], proposals, images, truth),
            ]
        )

    def proposal_settings(self, *, training: bool) -> ProposalSettings:
        """How proposals are made, which differs in evaluation."""
        s = self.settings
        return ProposalSettings(
            before_nms=s.rpn_pre_nms_top_n if training else s.rpn_pre_nms_top_n_eval,
            after_nms=s.rpn_post_nms_top_n if training else s.rpn_post_nms_top_n_eval,
            nms_threshold=s.rpn_nms_threshold,
            per_batch=training and s.proposals_per_batch,
            legacy=s.legacy,
        )

    def rpn_losses(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, sizes_hw: Tensor, truth: Truth
    ) -> tuple[Tensor, Tensor]:
        """The losses of objectness and of the anchors' boxes, ()."""
        s = self.settings
        with torch.no_grad():
            matched, kind = rpn.targets(
                anchors,
                truth.boxes_xyxy,
                truth.labels > 0,
                sizes_hw,
                drop_straddling=s.drop_straddling,
                legacy=s.legacy,
            )
            drawn, is_drawn = matcher.draw(kind, truth.seeds, s.rpn_batch_size_per_image, s.rpn_positive_fraction)
        return rpn.loss(logits, deltas, anchors, truth.boxes_xyxy, matched, drawn, is_drawn, kind, legacy=s.legacy)

    def head_losses(
        self, features: list[Tensor], proposals: rpn.Proposals, images: Tensor, truth: Truth
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The losses of class, box and mask, ()."""
        s = self.settings
        with torch.no_grad():
            regions, matched, positive = self.sample(proposals, truth)
        labels = truth.labels[regions.images, matched] * positive
        logits, deltas = self.box_head(self.pool(features, regions, BOX_CELLS))
        classifier = F.cross_entropy(logits, labels)

        positives = positive.nonzero()[:, 0]
        of_truth = regions.images[positives], matched[positives]
        inside = Regions(regions.boxes_xyxy[positives], regions.images[positives])
        own_class = labels[positives]
        wanted = box_coder.encode(
            truth.boxes_xyxy[of_truth], inside.boxes_xyxy, box_coder.HEAD_WEIGHTS, legacy=s.legacy
        )
        off = F.smooth_l1_loss(deltas[positives, own_class], wanted, beta=s.box_smooth_l1_beta, reduction="none").sum()

        with torch.no_grad():
            edges = truth.edges[of_truth]
            cut = (
                self.soft_masks(edges, inside, images)
                if s.soft_masks
                else masks.rasterise(edges, inside.boxes_xyxy, MASK_SIZE)
            )
        mask = self.mask_loss(features, inside, own_class, cut.float())
        return classifier, off / max(1, len(labels)), mask

    def mask_loss(self, features: list[Tensor], regions: Regions, labels: Tensor, wanted: Tensor) -> Tensor:
        """Binary cross-entropy of the masks, (); a batch without positive regions still uses every weight, for 0."""
        if not len(labels):
            nothing = labels.new_zeros(2)  # for one the head would be compiled apart
            logits = self.mask_head(self.pool(features, Regions(wanted.new_ones(2, 4), nothing), MASK_CELLS), nothing)
            return logits.sum() * 0.0
        logits = self.mask_head(self.pool(features, regions, MASK_CELLS), labels)
        return F.binary_cross_entropy_with_logits(logits, wanted)

    def soft_masks(self, edges: Tensor, regions: Regions, images: Tensor) -> Tensor:
        """Masks (R, 28, 28) cut with RoIAlign out of whole ones, as torchvision does: between 0 and 1 at the rim."""
        side = max(images.shape[2:])
        whole = constant((0, 0, side, side), edges.device).expand(len(edges), 4)
        bitmaps = masks.rasterise(edges, whole, side).float()[:, None]
        numbers = torch.arange(len(edges), device=edges.device)[:, None].to(edges)
        return ops.roi_align(bitmaps, torch.cat([numbers, regions.boxes_xyxy], dim=1), (MASK_SIZE, MASK_SIZE))[:, 0]

    def sample(self, proposals: rpn.Proposals, truth: Truth) -> tuple[Regions, Tensor, Tensor]:
        """The regions to learn from: drawn of proposals and the truth itself.

        Returns them with the index of the truth that each overlaps most (R,), and whether it is positive (R,) bool.
        """
        s = self.settings
        boxes = torch.cat([proposals.boxes_xyxy, truth.boxes_xyxy], dim=1)
        there = torch.cat([proposals.is_proposal, truth.labels > 0], dim=1)
        matches = [
            matcher.match(
                image_boxes,
                truth_boxes,
                labels > 0,
                positive_iou=POSITIVE_IOU,
                negative_iou=POSITIVE_IOU,
                keep_best=False,
                legacy=s.legacy,
            )
            for image_boxes, truth_boxes, labels in zip(boxes, truth.boxes_xyxy, truth.labels, strict=True)
        ]
        matched, kind = (torch.stack(part) for part in zip(*matches, strict=True))
        kind = kind.masked_fill(~there, matcher.IGNORED)
        drawn, is_drawn = matcher.draw(kind, truth.seeds + 1, s.box_batch_size_per_image, s.box_positive_fraction)
        images, slot = is_drawn.nonzero(as_tuple=True)
        index = drawn[images, slot]
        return Regions(boxes[images, index], images), matched[images, index], kind[images, index] == 1

    def pool(self, features: list[Tensor], regions: Regions, cells: int) -> Tensor:
        """The regions (R, 256, cells, cells) of the pyramid's four finest levels."""
        return roi_align(
            features,
            regions.boxes_xyxy,
            regions.images,
            cells,
            strides_px=POOLED_STRIDES_PX,
            legacy=self.settings.legacy,
        )

    def detect(self, features: list[Tensor], proposals: rpn.Proposals, sizes_hw: Tensor) -> Detections:
        """The detections of each image: the best of every class after NMS, with their masks."""
        s = self.settings
        images, slot = proposals.is_proposal.nonzero(as_tuple=True)
        regions = Regions(proposals.boxes_xyxy[images, slot], images)
        logits, deltas = self.box_head(self.pool(features, regions, BOX_CELLS))
        scores = logits.softmax(dim=1)
        boxes = box_coder.decode(deltas, regions.boxes_xyxy[:, None], box_coder.HEAD_WEIGHTS, legacy=s.legacy)
        boxes = box_coder.clip(boxes, sizes_hw[images, None], legacy=s.legacy)
        large = (box_coder.widths_heights(boxes, legacy=s.legacy) >= MIN_DETECTION_PX).all(dim=-1)
        eligible = (scores > s.score_threshold) & large

        region, label = eligible[:, 1:].nonzero(as_tuple=True)
        group = images[region] * s.num_classes + label + 1
        order = group.argsort(stable=True)
        region, label, group = region[order], label[order] + 1, group[order]
        boxes, scores = boxes[region, label], scores[region, label]
        sizes = group.new_zeros(len(sizes_hw) * s.num_classes).index_add_(0, group, torch.ones_like(group))
        of_images = sizes.view(len(sizes_hw), s.num_classes).tolist()  # waits for the device, once

        found: list[tuple[Tensor, Tensor, Tensor]] = []
        start = 0
        for of_classes in of_images:
            own = slice(start, start := start + sum(of_classes))
            keep = rpn.suppress(boxes[own], scores[own], of_classes, s.nms_threshold, s.legacy)[: s.max_detections]
            found.append((boxes[own][keep], scores[own][keep], label[own][keep]))
        boxes_xyxy, best, labels = (rpn.pad(list(part)) for part in zip(*found, strict=True))
        images, slot = (labels > 0).nonzero(as_tuple=True)
        probabilities = boxes_xyxy.new_zeros(*labels.shape, MASK_SIZE, MASK_SIZE)
        if len(images):
            pooled = self.pool(features, Regions(boxes_xyxy[images, slot], images), MASK_CELLS)
            probabilities[images, slot] = self.mask_head(pooled, labels[images, slot]).sigmoid()
        return Detections(boxes_xyxy, best, labels, probabilities)
