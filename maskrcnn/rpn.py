"""The region proposal network (Faster R-CNN, section 3.1, on a pyramid): where objects may be.

B images, A anchors of all levels, P proposals of an image, G ground-truth boxes, S anchors that are drawn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import nms

from maskrcnn import box_coder, matcher
from maskrcnn.anchors import RATIOS, SIZES_PX, grid_hw, make_anchors
from maskrcnn.backbone import NUM_CHANNELS

POSITIVE_IOU, NEGATIVE_IOU = 0.7, 0.3
BETA = 1 / 9  # of smooth L1
ELSEWHERE_PX = -1e4  # outside of every image


class Proposals(NamedTuple):
    """Regions of a batch.

    boxes_xyxy: (B, P, 4) pixels of the padded images, the most likely first. is_proposal: (B, P), False is padding.
    """

    boxes_xyxy: Tensor
    is_proposal: Tensor


@dataclass(frozen=True)
class ProposalSettings:
    """How proposals are made: before NMS the best of each level, after it those of an image, or of the whole batch.

    min_size_px: smaller ones are dropped.
    """

    before_nms: int
    after_nms: int
    nms_threshold: float
    per_batch: bool
    legacy: bool
    min_size_px: float = 1e-3


class RegionProposals(nn.Module):
    """The network's head and what is made of its answers."""

    def __init__(self, *, legacy: bool, sizes_px: tuple[int, ...] = SIZES_PX):
        super().__init__()
        self.head = RPNHead(NUM_CHANNELS, len(RATIOS))
        self.legacy, self.sizes_px = legacy, sizes_px

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (B, A) and deltas (B, A, 4) of all anchors, float32."""
        logits, deltas = self.head(features)
        batch = len(features[0])
        return (
            torch.cat([level.permute(0, 2, 3, 1).reshape(batch, -1) for level in logits], dim=1).float(),
            torch.cat([level.permute(0, 2, 3, 1).reshape(batch, -1, 4) for level in deltas], dim=1).float(),
        )

    def anchors(self, images: Tensor) -> Tensor:
        """The anchors (A, 4) of padded images (B, 3, H, W)."""
        height, width = images.shape[2:]
        return make_anchors(height, width, images.device, legacy=self.legacy, sizes_px=self.sizes_px)


@torch.no_grad()
def propose(
    logits: Tensor, deltas: Tensor, anchors: Tensor, images: Tensor, sizes_hw: Tensor, settings: ProposalSettings
) -> Proposals:
    """The proposals of logits (B, A) and deltas (B, A, 4); images (B, 3, H, W) are padded, sizes_hw (B, 2) inside."""
    legacy, batch = settings.legacy, len(logits)
    boxes, scores = [], []
    start = 0
    for rows, columns in grid_hw(*images.shape[2:]):
        count = rows * columns * len(RATIOS)
        best, index = logits[:, start : start + count].topk(min(settings.before_nms, count), dim=1)
        index = index + start
        of_index = index[..., None].expand(-1, -1, 4)
        decoded = box_coder.decode(deltas.gather(1, of_index), anchors[index], box_coder.RPN_WEIGHTS, legacy=legacy)
        boxes.append(box_coder.clip(decoded, sizes_hw[:, None], legacy=legacy))
        scores.append(best)
        start += count
    all_boxes, all_scores = torch.cat(boxes, dim=1), torch.cat(scores, dim=1)
    large = (box_coder.widths_heights(all_boxes, legacy=legacy) >= settings.min_size_px).all(dim=-1)
    # To leave them out here, their number would have to be known; so they overlap no box, and come last.
    all_boxes = all_boxes.masked_fill(~large[..., None], ELSEWHERE_PX)
    all_scores = all_scores.masked_fill(~large, -math.inf)

    kept_boxes, kept_scores, kept_large = [], [], []
    for image in range(batch):
        sizes = [level.shape[1] for level in scores]
        keep = suppress(all_boxes[image], all_scores[image], sizes, settings.nms_threshold, legacy)[
            : settings.after_nms
        ]
        kept_boxes.append(all_boxes[image, keep])
        kept_scores.append(all_scores[image, keep])
        kept_large.append(large[image, keep])
    is_proposal = pad(kept_large)
    if settings.per_batch and sum(map(len, kept_scores)) > settings.after_nms:
        least = torch.cat(kept_scores).topk(settings.after_nms).values[-1]
        is_proposal = is_proposal & (pad(kept_scores) >= least)
    return Proposals(pad(kept_boxes), is_proposal)


def suppress(boxes_xyxy: Tensor, scores: Tensor, sizes: Sequence[int], iou: float, legacy: bool) -> Tensor:
    """Indices (D,) of the boxes (N, 4) that non-maximum suppression inside each group leaves, best first.

    sizes: how many boxes each group has, which lie one group after the other. Group by group: torchvision's batched
    form shifts the groups apart, which rounds the overlaps.
    """
    written = box_coder.with_end(boxes_xyxy, legacy=legacy)
    kept = [torch.zeros(0, dtype=torch.int64, device=scores.device)]
    for start, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
        if size:
            group = slice(start, start + size)
            kept.append(start + nms_there(written[group], scores[group], iou))
    keep = torch.cat(kept)
    return keep[scores[keep].argsort(descending=True, stable=True)]


def nms_there(boxes_xyxy: Tensor, scores: Tensor, iou: float) -> Tensor:
    """torchvision's NMS; for a device that it has no kernel for, such as another vendor's, by way of the CPU."""
    try:
        return nms(boxes_xyxy, scores, iou)
    except NotImplementedError:
        return nms(boxes_xyxy.cpu(), scores.cpu(), iou).to(boxes_xyxy.device)


def pad(rows: list[Tensor]) -> Tensor:
    """Stack (P_i, ...) to (B, P, ...), with zeros below."""
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def targets(
    anchors: Tensor,
    truth_xyxy: Tensor,
    is_truth: Tensor,
    sizes_hw: Tensor,
    *,
    drop_straddling: bool,
    legacy: bool,
) -> tuple[Tensor, Tensor]:
    """What each anchor should say: the box (B, A) that it is for, and positive 1, negative 0 or ignored -1 (B, A).

    drop_straddling: anchors that reach over the border of their image, sizes_hw (B, 2), are ignored.
    """
    index, kind = zip(
        *(
            matcher.match(
                anchors,
                truth,
                valid,
                positive_iou=POSITIVE_IOU,
                negative_iou=NEGATIVE_IOU,
                keep_best=True,
                legacy=legacy,
            )
            for truth, valid in zip(truth_xyxy, is_truth, strict=True)
        ),
        strict=True,
    )
    kinds = torch.stack(kind)
    if drop_straddling:
        limits = sizes_hw.flip(1)[:, None].to(anchors)
        inside = (anchors[:, :2] >= 0).all(dim=1) & (anchors[:, 2:] < limits).all(dim=-1)
        kinds = kinds.masked_fill(~inside, matcher.IGNORED)
    return torch.stack(index), kinds


def loss(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    truth_xyxy: Tensor,
    matched: Tensor,
    drawn: Tensor,
    is_drawn: Tensor,
    kind: Tensor,
    *,
    legacy: bool,
) -> tuple[Tensor, Tensor]:
    """Losses of objectness (binary cross-entropy) and boxes (smooth L1), (): means over the anchors drawn.

    logits: (B, A). deltas: (B, A, 4). truth_xyxy: (B, G, 4). matched, kind: (B, A) as in `targets`. drawn, is_drawn:
    (B, S) as in `sampling.draw`.
    """
    count = is_drawn.sum().clamp(min=1)
    positive = is_drawn & (kind.gather(1, drawn) == 1)
    objectness = F.binary_cross_entropy_with_logits(logits.gather(1, drawn), positive.float(), reduction="none")
    boxes = truth_xyxy.gather(1, matched.gather(1, drawn)[..., None].expand(-1, -1, 4))
    wanted = box_coder.encode(boxes, anchors[drawn], box_coder.RPN_WEIGHTS, legacy=legacy)
    wanted = wanted.masked_fill(~positive[..., None], 0)  # where there is no truth it is infinite
    predicted = deltas.gather(1, drawn[..., None].expand(-1, -1, 4))
    off = F.smooth_l1_loss(predicted, wanted, beta=BETA, reduction="none").sum(dim=-1)
    return (objectness * is_drawn).sum() / count, (off * positive).sum() / count
