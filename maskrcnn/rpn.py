"""Region proposal network on a feature pyramid (Faster R-CNN, section 3.1).

B images, A anchors of all levels, P proposals of an image, G ground-truth boxes, S sampled anchors.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead

from detection.nn import box_coder, matcher
from detection.nn.nms import nms
from detection.nn.resnet_fpn import NUM_CHANNELS
from maskrcnn.anchors import RATIOS, grid_hw, make_anchors
from maskrcnn.config import Config

POSITIVE_IOU, NEGATIVE_IOU = 0.7, 0.3
SMOOTH_L1_BETA = 1 / 9
MIN_PROPOSAL_PX = 1e-3


class Proposals(NamedTuple):
    """Proposals of a batch.

    boxes_xyxy: (B, P, 4) pixels of the padded images, highest score first. logits: (B, P) of their objectness.
    valid: (B, P), False for padding. P follows from the settings and the size of the images, so that the host need not
    wait for the number of proposals.
    """

    boxes_xyxy: Tensor
    logits: Tensor
    valid: Tensor


class RPN(nn.Module):
    """Head of the region proposal network, and its anchors."""

    def __init__(self, config: Config):
        super().__init__()
        self.head = RPNHead(NUM_CHANNELS, len(RATIOS))
        self.legacy, self.sizes_px = config.legacy_boxes, config.anchor_sizes

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits (B, A) and deltas (B, A, 4) of all anchors, float32."""
        return flatten_levels(*self.head(features))

    def anchors(self, images: Tensor) -> Tensor:
        """Return the anchors (A, 4) of padded images (B, 3, H, W)."""
        height, width = images.shape[2:]
        return make_anchors(height, width, images.device, legacy=self.legacy, sizes_px=self.sizes_px)


def flatten_levels(logits: list[Tensor], deltas: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Join logits (B, 3, h, w) and deltas (B, 12, h, w) of each level to (B, A) and (B, A, 4), float32."""
    batch = len(logits[0])
    return (
        torch.cat([level.permute(0, 2, 3, 1).reshape(batch, -1) for level in logits], dim=1).float(),
        torch.cat([level.permute(0, 2, 3, 1).reshape(batch, -1, 4) for level in deltas], dim=1).float(),
    )


@torch.no_grad()
def generate_proposals(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    images: Tensor,
    sizes_hw: Tensor,
    config: Config,
    *,
    training: bool,
) -> Proposals:
    """Decode logits (B, A) and deltas (B, A, 4), keep the best of each level, apply NMS, keep the best of those.

    images: (B, 3, H, W), padded. sizes_hw: (B, 2) without the padding.
    """
    legacy, batch = config.legacy_boxes, len(logits)
    pre_nms_top_n = config.rpn_pre_nms_top_n if training else config.rpn_pre_nms_top_n_eval
    post_nms_top_n = config.rpn_post_nms_top_n_per_image if training else config.rpn_post_nms_top_n_eval
    cut_batch = training and config.proposals_per_batch
    if cut_batch:
        post_nms_top_n *= config.batch_size // config.grad_accum_steps

    # Each level is padded to the width W of the largest: (B, levels, W).
    counts = [rows * columns * len(RATIOS) for rows, columns in grid_hw(*images.shape[2:])]
    width = min(pre_nms_top_n, max(counts))
    levels, start = [], 0
    for level_logits, count in zip(logits.split(counts, dim=1), counts, strict=True):
        top, index = level_logits.topk(min(width, count), dim=1)
        padding = 0, width - top.shape[1]
        is_anchor = F.pad(torch.ones_like(top, dtype=torch.bool), padding)
        levels.append((F.pad(top, padding), F.pad(index + start, padding), is_anchor))
        start += count
    scores, index, valid = (torch.stack(part, dim=1).flatten(1) for part in zip(*levels, strict=True))
    boxes = box_coder.decode(deltas.gather(1, index[..., None].expand(-1, -1, 4)), anchors[index], legacy=legacy)
    boxes = box_coder.clip(boxes, sizes_hw[:, None], legacy=legacy)
    if not legacy:  # a legacy box is never empty, and the reference has no minimum size
        valid = valid & (box_coder.widths_heights(boxes, legacy=legacy) >= MIN_PROPOSAL_PX).all(dim=-1)
    exclusive_boxes = box_coder.to_exclusive(boxes, legacy=legacy)
    keep = nms(exclusive_boxes.view(-1, width, 4), valid.view(-1, width), config.rpn_nms_threshold).view(batch, -1)

    scores, order = scores.masked_fill(~keep, -math.inf).sort(dim=1, descending=True, stable=True)
    scores, order = scores[:, :post_nms_top_n], order[:, :post_nms_top_n]
    valid = keep.gather(1, order)
    if cut_batch:
        best = scores.flatten().topk(min(post_nms_top_n, scores.numel())).indices
        valid = valid & torch.zeros_like(valid).view(-1).index_fill(0, best, True).view_as(valid)
    return Proposals(boxes.gather(1, order[..., None].expand(-1, -1, 4)), scores, valid)


def assign_targets(
    anchors: Tensor,
    gt_boxes_xyxy: Tensor,
    gt_valid: Tensor,
    sizes_hw: Tensor,
    *,
    drop_straddling: bool,
    legacy: bool,
) -> tuple[Tensor, Tensor]:
    """Return the index (B, A) of each anchor's ground-truth box, and match labels (B, A) as from `matcher.match`.

    drop_straddling: ignore anchors that cross the border of their image, sizes_hw (B, 2).
    """
    index, labels = zip(
        *(
            matcher.match(
                anchors,
                gt_boxes,
                valid,
                positive_iou=POSITIVE_IOU,
                negative_iou=NEGATIVE_IOU,
                allow_low_quality_matches=True,
                legacy=legacy,
            )
            for gt_boxes, valid in zip(gt_boxes_xyxy, gt_valid, strict=True)
        ),
        strict=True,
    )
    match_labels = torch.stack(labels)
    if drop_straddling:
        match_labels = match_labels.masked_fill(~is_inside(anchors, sizes_hw), matcher.IGNORED)
    return torch.stack(index), match_labels


def is_inside(anchors: Tensor, sizes_hw: Tensor) -> Tensor:
    """Return (B, A) True for anchors (A, 4) that do not cross the border of the image, sizes_hw (B, 2)."""
    limits = sizes_hw.flip(1)[:, None].to(anchors)
    return (anchors[:, :2] >= 0).all(dim=1) & (anchors[:, 2:] < limits).all(dim=-1)


def rpn_loss(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    gt_boxes_xyxy: Tensor,
    matched: Tensor,
    sampled: Tensor,
    is_sampled: Tensor,
    match_labels: Tensor,
    *,
    legacy: bool,
) -> tuple[Tensor, Tensor]:
    """Return the objectness (binary cross-entropy) and box (smooth L1) losses, (): means over the sampled anchors.

    logits: (B, A). deltas: (B, A, 4). gt_boxes_xyxy: (B, G, 4). matched, match_labels: (B, A) as from
    `assign_targets`. sampled, is_sampled: (B, S) as from `matcher.sample_pos_neg`.
    """
    count = is_sampled.sum().clamp(min=1)
    positive = is_sampled & (match_labels.gather(1, sampled) == 1)
    objectness = F.binary_cross_entropy_with_logits(logits.gather(1, sampled), positive.float(), reduction="none")
    boxes = gt_boxes_xyxy.gather(1, matched.gather(1, sampled)[..., None].expand(-1, -1, 4))
    target_deltas = box_coder.encode(boxes, anchors[sampled], legacy=legacy)
    target_deltas = target_deltas.masked_fill(~positive[..., None], 0)  # infinite where there is no ground truth
    predicted = deltas.gather(1, sampled[..., None].expand(-1, -1, 4))
    box_loss = F.smooth_l1_loss(predicted, target_deltas, beta=SMOOTH_L1_BETA, reduction="none").sum(dim=-1)
    return (objectness * is_sampled).sum() / count, (box_loss * positive).sum() / count
