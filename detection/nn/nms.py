"""Greedy non-maximum suppression (NMS) of many groups of boxes at once.

A group is the boxes that may suppress each other, such as those of one class or pyramid level in one image. Shapes:
N boxes, G groups, W boxes of the largest group.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from detection.boxes import pairwise_iou

# Limit for the number of pairs whose IoU is computed at once: about 0.5 GiB in float32.
MAX_PAIRS = 2**25
# Rounds between two tests for convergence. On an accelerator, a test waits for all queued work, and a round is cheap.
ROUNDS_PER_TEST = 16
# Upper limits of the size classes of `grouped_nms`. Groups of one class are padded to the largest among them.
GROUP_SIZES = (4, 16, 64)


def nms(boxes_xyxy: Tensor, valid: Tensor, iou_threshold: float, *, drop_equal: bool = False) -> Tensor:
    """Return the mask (G, W) of the boxes that remain. boxes_xyxy: (G, W, 4), best first. valid: (G, W), no padding.

    A box is dropped if its IoU with a better box that remains is above the threshold, or, with drop_equal, equal to it.
    All methods return the same.
    """
    if boxes_xyxy.device.type != "cpu":
        return nms_parallel(boxes_xyxy, valid, iou_threshold, drop_equal=drop_equal)
    method = nms_by_rank if has_many_groups(*valid.shape) else nms_by_group
    return method(boxes_xyxy, valid, iou_threshold, drop_equal=drop_equal)


def round_threshold(iou_threshold: float, dtype: torch.dtype, *, drop_equal: bool) -> float:
    """Return the value of a data type above which an IoU drops a box, as a comparison in double precision would.

    torch rounds a threshold to the tensor's type: 0.6 rounds up in float32, and an IoU of 3/5 would not be above it.
    """
    if drop_equal:
        iou_threshold = math.nextafter(iou_threshold, -math.inf)
    limit = torch.tensor(iou_threshold, dtype=dtype, device="cpu")
    if limit.item() > iou_threshold:
        limit = torch.nextafter(limit, torch.tensor(-math.inf, dtype=dtype, device="cpu"))
    return limit.item()


def has_many_groups(num_groups: int, width: int) -> bool:
    """Return whether `nms_by_rank` is faster than `nms_by_group`: their cost is a number of calls."""
    return num_groups >= width


def nms_by_group(boxes_xyxy: Tensor, valid: Tensor, iou_threshold: float, *, drop_equal: bool) -> Tensor:
    """Apply `nms` to one group after another, with torchvision's kernel."""
    keep = torch.zeros_like(valid)
    keep[valid] = nms_sequential(boxes_xyxy[valid], valid.sum(dim=1).tolist(), iou_threshold, drop_equal=drop_equal)
    return keep


def nms_sequential(boxes_xyxy: Tensor, sizes: list[int], iou_threshold: float, *, drop_equal: bool) -> Tensor:
    """Apply `nms` with torchvision's kernel to groups of these sizes in boxes (N, 4): (N,) bool."""
    limit = round_threshold(iou_threshold, boxes_xyxy.dtype, drop_equal=drop_equal)
    descending = -torch.arange(max(sizes, default=0)).to(boxes_xyxy)
    keep = torch.zeros(len(boxes_xyxy), dtype=torch.bool)
    for boxes, mask in zip(boxes_xyxy.split(sizes), keep.split(sizes), strict=True):
        mask[torchvision.ops.nms(boxes, descending[: len(boxes)], limit)] = True
    return keep


def nms_by_rank(boxes_xyxy: Tensor, valid: Tensor, iou_threshold: float, *, drop_equal: bool) -> Tensor:
    """Apply `nms` rank by rank: the best box of all groups suppresses the others of its group, then the next one."""
    limit = round_threshold(iou_threshold, boxes_xyxy.dtype, drop_equal=drop_equal)
    # (W, G) each: the boxes after a rank are one block of memory.
    left, top, right, bottom = boxes_xyxy.permute(2, 1, 0).contiguous()
    area, keep = (right - left) * (bottom - top), valid.t().clone(memory_format=torch.contiguous_format)
    for rank in range(len(keep) - 1):
        rest = slice(rank + 1, None)
        width = (torch.minimum(right[rest], right[rank]) - torch.maximum(left[rest], left[rank])).clamp_(min=0)
        height = (torch.minimum(bottom[rest], bottom[rank]) - torch.maximum(top[rest], top[rank])).clamp_(min=0)
        intersection = width.mul_(height)
        iou = intersection / (area[rest] + area[rank] - intersection)  # NaN, which suppresses nothing, without areas
        keep[rest] &= ~((iou > limit) & keep[rank])
    return keep.t()


def nms_parallel(boxes_xyxy: Tensor, valid: Tensor, iou_threshold: float, *, drop_equal: bool) -> Tensor:
    """Apply `nms` to all groups in parallel, with a single host synchronization in almost all cases.

    A box remains if no better remaining box suppresses it. The loop repeats this rule until the mask is stable. The
    result equals that of sequential NMS, because after round r at least the first r boxes of each group are final.
    """
    suppressors = pack_suppressors(boxes_xyxy, iou_threshold, drop_equal=drop_equal)
    keep = previous = valid
    while True:
        for _ in range(ROUNDS_PER_TEST):
            previous, keep = keep, valid & ~((suppressors & pack_bits(keep).unsqueeze(1)) > 0).any(dim=-1)
        if torch.equal(keep, previous):
            return keep


def pack_suppressors(boxes_xyxy: Tensor, iou_threshold: float, *, drop_equal: bool) -> Tensor:
    """Return for each box (G, W, 4) the better boxes that overlap it too much, as bits (G, W, ceil(W / 8)) uint8."""
    limit = round_threshold(iou_threshold, boxes_xyxy.dtype, drop_equal=drop_equal)
    width = boxes_xyxy.shape[1]
    rank = torch.arange(width, device=boxes_xyxy.device)
    better = rank < rank[:, None]
    packed = []
    for groups in boxes_xyxy.split(max(1, MAX_PAIRS // width**2)):
        start, rows = 0, []
        for part in groups.split(max(1, MAX_PAIRS // width), dim=1):
            overlaps = pairwise_iou(part, groups) > limit
            rows.append(pack_bits(overlaps & better[start : (start := start + part.shape[1])]))
        packed.append(torch.cat(rows, dim=1))
    return torch.cat(packed)


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a mask (..., N) to (..., ceil(N / 8)) uint8."""
    bits = F.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    return (bits << torch.arange(8, device=mask.device, dtype=torch.uint8)).sum(dim=-1, dtype=torch.uint8)


def grouped_nms(boxes_xyxy: Tensor, group: Tensor, iou_threshold: float, *, drop_equal: bool = False) -> Tensor:
    """Apply `nms` to each group of boxes: (N,) bool, True for those that remain.

    boxes_xyxy: (N, 4) sorted by group and, within a group, best first. group: (N,). Groups of similar size are
    processed together, because the cost is the square of the padded size.
    """
    is_cpu = boxes_xyxy.device.type == "cpu"
    _, row, counts = group.unique_consecutive(return_inverse=True, return_counts=True)
    size = counts[row]
    keep = torch.empty_like(group, dtype=torch.bool)
    for lower, upper in pairwise((0, *GROUP_SIZES, len(group))):
        (same_size,) = ((size > lower) & (size <= upper)).nonzero(as_tuple=True)
        if not len(same_size):
            continue
        same_boxes = boxes_xyxy[same_size]
        sizes = counts[(counts > lower) & (counts <= upper)].tolist() if is_cpu else []
        if is_cpu and not has_many_groups(len(sizes), max(sizes)):  # without padding, which a single group may multiply
            keep[same_size] = nms_sequential(same_boxes, sizes, iou_threshold, drop_equal=drop_equal)
        else:
            boxes, valid, row_and_rank = pad_groups(same_boxes, group[same_size])
            keep[same_size] = nms(boxes, valid, iou_threshold, drop_equal=drop_equal)[row_and_rank]
    return keep


def pad_groups(boxes_xyxy: Tensor, group: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return boxes (G, W, 4) of the sorted groups (N,), a mask (G, W) without padding, and the index of each box."""
    _, row, counts = group.unique_consecutive(return_inverse=True, return_counts=True)
    index = row, rank_in_group(group)
    padded = boxes_xyxy.new_zeros(len(counts), int(counts.max()), 4)
    valid = torch.zeros(padded.shape[:2], dtype=torch.bool, device=group.device)
    padded[index], valid[index] = boxes_xyxy, True
    return padded, valid, index


def sort_by_group(group: Tensor, score: Tensor) -> Tensor:
    """Return the stable order (N,) by group and, within a group, by descending score."""
    by_score = score.argsort(descending=True, stable=True)
    return by_score[group[by_score].argsort(stable=True)]


def rank_in_group(sorted_group: Tensor) -> Tensor:
    """Return the rank (N,) of each row within its group, from 0."""
    _, inverse, counts = sorted_group.unique_consecutive(return_inverse=True, return_counts=True)
    offsets = counts.cumsum(0) - counts
    return torch.arange(len(sorted_group), device=sorted_group.device) - offsets[inverse]
