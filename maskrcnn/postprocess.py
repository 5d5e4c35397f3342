"""Box-head predictions to detections: decoding, score threshold, non-maximum suppression per class.

B images, D detections of the image with the most, K classes with background 0, R ROIs, S side of a mask (28).
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import nms

from detection.nn import box_coder
from maskrcnn.config import Config
from maskrcnn.roi_align import Rois

MIN_DETECTION_PX = 1e-2


class Detections(NamedTuple):
    """Detections of a batch, per image.

    boxes_xyxy: (B, D, 4) pixels of the resized image. scores: (B, D) in [0, 1]. labels: (B, D) in 1..K-1, 0 is padding.
    masks: (B, D, S, S) probability of each point of the box to be inside the object, for the label's class.
    """

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor


def select_detections(
    logits: Tensor, deltas: Tensor, rois: Rois, sizes_hw: Tensor, config: Config
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the best detections of each image from logits (R, K) and deltas (R, K, 4); sizes_hw: (B, 2).

    Returns boxes (B, D, 4), scores (B, D) and labels (B, D) as in `Detections`.
    """
    legacy, num_images, num_classes = config.legacy_boxes, len(sizes_hw), config.num_classes
    scores = logits.softmax(dim=1)
    boxes = box_coder.decode(deltas, rois.boxes_xyxy[:, None], box_coder.BOX_HEAD_WEIGHTS, legacy=legacy)
    boxes = box_coder.clip(boxes, sizes_hw[rois.batch_index, None], legacy=legacy)
    large = (box_coder.widths_heights(boxes, legacy=legacy) >= MIN_DETECTION_PX).all(dim=-1)
    candidates = (scores > config.score_threshold) & large

    roi, label = candidates[:, 1:].nonzero(as_tuple=True)
    group = rois.batch_index[roi] * num_classes + label + 1
    order = group.argsort(stable=True)
    roi, label, group = roi[order], label[order] + 1, group[order]
    boxes, scores = boxes[roi, label], scores[roi, label]
    sizes = group.new_zeros(num_images * num_classes).index_add_(0, group, torch.ones_like(group))
    sizes_by_image = sizes.view(num_images, num_classes).tolist()  # the only wait for the device here

    selected: list[tuple[Tensor, Tensor, Tensor]] = []
    start = 0
    for class_sizes in sizes_by_image:
        rows = slice(start, start := start + sum(class_sizes))
        keep = grouped_nms(boxes[rows], scores[rows], class_sizes, config.nms_threshold, legacy=legacy)
        keep = keep[: config.max_detections]
        selected.append((boxes[rows][keep], scores[rows][keep], label[rows][keep]))
    boxes_xyxy, top_scores, labels = (stack_padded(list(part)) for part in zip(*selected, strict=True))
    return boxes_xyxy, top_scores, labels


def grouped_nms(
    boxes_xyxy: Tensor, scores: Tensor, sizes: Sequence[int], nms_threshold: float, *, legacy: bool
) -> Tensor:
    """Apply NMS within each group of boxes (N, 4); return the indices (D,) of the kept boxes, best first.

    sizes: number of boxes per group; groups are contiguous. Runs group by group, since torchvision's batched form
    shifts the groups apart, which rounds the overlaps.
    """
    exclusive_boxes = box_coder.to_exclusive(boxes_xyxy, legacy=legacy)
    kept = [torch.zeros(0, dtype=torch.int64, device=scores.device)]
    for start, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
        if size:
            group = slice(start, start + size)
            kept.append(start + nms_with_cpu_fallback(exclusive_boxes[group], scores[group], nms_threshold))
    keep = torch.cat(kept)
    return keep[scores[keep].argsort(descending=True, stable=True)]


def nms_with_cpu_fallback(boxes_xyxy: Tensor, scores: Tensor, nms_threshold: float) -> Tensor:
    """Apply torchvision's NMS, on the CPU if torchvision has no kernel for the device, such as another vendor's."""
    try:
        return nms(boxes_xyxy, scores, nms_threshold)
    except NotImplementedError:
        return nms(boxes_xyxy.cpu(), scores.cpu(), nms_threshold).to(boxes_xyxy.device)


def stack_padded(rows: list[Tensor]) -> Tensor:
    """Stack tensors (P_i, ...) to (B, P, ...), padded with zeros."""
    return pad_sequence(rows, batch_first=True)
