"""Which anchors or proposals a loss is computed on: matched to the truth by overlap, then drawn at random.

The draw of an image is a function of a number that comes with it, not of the state of a generator: neither ranks nor
a resume change it. B images, G ground-truth boxes, N anchors or proposals, S of them drawn.
"""

import torch
from torch import Tensor

from maskrcnn.box_coder import pairwise_iou

IGNORED = -1


def match(
    boxes_xyxy: Tensor,
    truth_xyxy: Tensor,
    is_truth: Tensor,
    *,
    positive_iou: float,
    negative_iou: float,
    keep_best: bool,
    legacy: bool,
) -> tuple[Tensor, Tensor]:
    """Match the boxes (N, 4) of one image to its truth (G, 4), of which `is_truth` (G,) tells what is no padding.

    Returns the index (N,) of the truth that each overlaps most, and whether it is positive 1, negative 0 or between
    the two and IGNORED (N,) int64. keep_best: what a ground-truth box overlaps most is positive however little that
    is, and so is whatever overlaps it as much (Faster R-CNN, section 3.1.2).
    """
    iou = pairwise_iou(truth_xyxy, boxes_xyxy, legacy=legacy).masked_fill(~is_truth[:, None], -1)
    overlap, index = iou.max(dim=0)
    kind = (overlap >= positive_iou).long()
    kind = kind.masked_fill((overlap >= negative_iou) & (overlap < positive_iou), IGNORED)
    if keep_best:
        best = iou.amax(dim=1, keepdim=True)
        kind = kind.masked_fill(((iou == best) & (best > 0)).any(dim=0), 1)
    return index, kind


def draw(kind: Tensor, seeds: Tensor, count: int, positive_share: float) -> tuple[Tensor, Tensor]:
    """Draw `count` of the positives and negatives of each image, of positives that share at most.

    kind: (B, N) as `match` gives it. seeds: (B,). Returns indices (B, S), the positives first, and whether each is
    one that was drawn (B, S): where an image has too few, the rest is filled up with others. S ≤ count + positives.
    """
    priority = noise(seeds, kind.shape[1])
    most = min(int(count * positive_share), kind.shape[1])
    value, positives = priority.masked_fill(kind != 1, 2).topk(most, dim=1, largest=False)
    is_positive = value < 2
    value, negatives = priority.masked_fill(kind != 0, 2).topk(min(count, kind.shape[1]), dim=1, largest=False)
    room = count - is_positive.sum(dim=1, keepdim=True)
    is_negative = (value < 2) & (torch.arange(negatives.shape[1], device=kind.device) < room)
    return torch.cat([positives, negatives], dim=1), torch.cat([is_positive, is_negative], dim=1)


def noise(seeds: Tensor, count: int) -> Tensor:
    """Numbers (B, count) float32 from 0 up to 1 that are a function of (seed, position): seeds (B,) of 31 bits.

    They are murmur3's finaliser over a counter, in 64-bit integers, which every kind of device has.
    """
    golden, first, second = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
    mask = torch.full((), 0xFFFFFFFF, device=seeds.device)
    bits = seeds[:, None] * golden + torch.arange(count, device=seeds.device) * first
    for shift, factor in ((16, first), (13, second)):
        bits = bits & mask
        bits = (bits ^ (bits >> shift)) * factor
    bits = bits & mask
    return ((bits ^ (bits >> 16)) >> 8).float() * 2.0**-24
