"""Masks: rasterize ground-truth edges within ROIs on the device, and paste predicted masks onto their image.

No mask is stored at the size of its image. E edges of a mask, R ROIs, D detections, S side of a mask (28).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detection.data import rle
from detection.data.coco import Split
from detection.data.rle import CocoRle

# Edges compared with the rows of their ROIs at once: bounds memory for very long polygons.
MAX_EDGES_PER_CHUNK = 256

MASK_SIZE = 28

Floats = NDArray[np.float32]


def mask_edges(split: Split, index: int) -> list[Floats]:
    """Return the mask of each box of an image as signed edges (E, 4): x0, y0, x1, y1 in pixels of the image.

    A point is inside if its winding number is not 0: the edges to its left that go down, minus those that go up.
    Every polygon is oriented so that its left side goes down, so overlapping polygons add up. Horizontal edges cross
    no row and are dropped.
    """
    polygons = split.polygons
    assert polygons is not None, "the split was read without masks"
    ring_offsets = polygons.ring_offsets[split.box_offsets[index] : split.box_offsets[index + 1] + 1]
    point_offsets = polygons.point_offsets[ring_offsets[0] : ring_offsets[-1] + 1]
    points_xy = polygons.points_xy[point_offsets[0] : point_offsets[-1]]
    ring_offsets, point_offsets = ring_offsets - ring_offsets[0], point_offsets - point_offsets[0]

    point_counts = np.diff(point_offsets)
    ring = np.repeat(np.arange(len(point_counts)), point_counts)  # ring of each point
    box = np.repeat(np.arange(len(ring_offsets) - 1), np.diff(ring_offsets))[ring]
    from_first = points_xy.astype(np.float64) - points_xy[point_offsets[ring]]  # small numbers for exact areas
    points = np.arange(len(ring))
    current, following = np.delete(points, point_offsets[1:] - 1), np.delete(points, point_offsets[:-1])
    (x0, y0), (x1, y1) = from_first[current].T, from_first[following].T
    areas = np.bincount(ring[current], x0 * y1 - x1 * y0, minlength=len(point_counts))  # 0 for rings of two points
    needs_reversal = (areas > 0)[ring[current]]
    starts, ends = np.where(needs_reversal, following, current), np.where(needs_reversal, current, following)
    edges = np.concatenate([points_xy[starts], points_xy[ends]], axis=1)
    kept = edges[:, 1] != edges[:, 3]
    ends_per_box = np.searchsorted(box[current][kept], np.arange(len(ring_offsets) - 1), side="right")
    return np.split(edges[kept], ends_per_box)[:-1]


def rasterize_edges(edges: Tensor, rois_xyxy: Tensor, size: int = MASK_SIZE) -> Tensor:
    """Rasterize masks within their ROIs: (R, size, size) float32 of 0 and 1, on any device, without a host sync.

    edges: (R, E, 4) of the mask of each ROI, as from `mask_edges`; horizontal edges are padding. rois_xyxy: (R, 4) in
    the same pixels; sides below 1 count as 1, as in the reference. A cell of the ROI's grid is 1 if its center is
    inside.
    """
    rois_xyxy = rois_xyxy.float()
    corners, extents = rois_xyxy[:, :2], (rois_xyxy[:, 2:] - rois_xyxy[:, :2]).clamp(min=1)
    on_grid = (edges.float() - corners.repeat(1, 2)[:, None]) * (size / extents).repeat(1, 2)[:, None]
    row = torch.arange(size, device=edges.device)
    center = row + 0.5
    crossings = on_grid.new_zeros(len(edges), size * (size + 1))  # one more column for crossings right of the ROI
    for chunk in on_grid.split(MAX_EDGES_PER_CHUNK, dim=1):
        x0, y0, x1, y1 = chunk.unsqueeze(-1).unbind(2)
        down, up = (y0 <= center) & (center < y1), (y1 <= center) & (center < y0)
        fraction = (center - y0) / torch.where(y0 == y1, 1.0, y1 - y0)
        x = torch.where(down | up, x0 + fraction * (x1 - x0), 0.0)
        column = (x - 0.5).ceil().clamp(0, size).long()
        signs = down.float() - up.float()
        crossings.scatter_add_(1, (row * (size + 1) + column).flatten(1), signs.flatten(1))
    winding = crossings.view(-1, size, size + 1)[..., :size].cumsum(dim=-1)
    return (winding != 0).float()


def paste_masks(masks: Floats, boxes_xyxy: Floats, size_hw: tuple[int, int], threshold: float = 0.5) -> list[CocoRle]:
    """Paste masks onto their image, each as COCO's compressed RLE.

    masks: (D, S, S) probabilities. boxes_xyxy: (D, 4) float32 in pixels of the image of size `size_hw`. Follows the
    reference: pad mask and box by one mask pixel per side, truncate the box to whole pixels with both ends included,
    resize the mask bilinearly and apply the threshold. Computes only the box's part of the image.
    """
    height, width = size_hw
    side = masks.shape[-1] + 2
    padded = np.pad(masks.astype(np.float32), ((0, 0), (1, 1), (1, 1)))
    low, high = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    half, center = (high - low) * np.float32(0.5), (high + low) * np.float32(0.5)
    half *= np.float32(side / (side - 2))
    corners = np.concatenate([center - half, center + half], axis=1).astype(np.int64).tolist()
    pasted = []
    for mask, (left, top, right, bottom) in zip(padded, corners, strict=True):
        x0, x1, x_weight = _resize_taps(left, right, width, side)
        y0, y1, y_weight = _resize_taps(top, bottom, height, side)
        columns = mask[:, x0] * (1 - x_weight) + mask[:, x1] * x_weight
        region = columns[y0] * (1 - y_weight[:, None]) + columns[y1] * y_weight[:, None] > threshold
        pasted.append(rle.encode_rle(_rle_counts(region, max(left, 0), max(top, 0), size_hw), size_hw))
    return pasted


def _resize_taps(first: int, last: int, limit: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """Return the two mask cells and the weight of the second, for each pixel `first` to `last` within the image."""
    length = max(last - first + 1, 1)
    pixels = np.arange(max(first, 0), min(last + 1, limit)) - first
    scale = np.float32(side) / np.float32(length)
    position = np.maximum((pixels.astype(np.float32) + np.float32(0.5)) * scale - np.float32(0.5), np.float32(0))
    low = position.astype(np.int64)
    return low, np.minimum(low + 1, side - 1), position - low.astype(np.float32)


def _rle_counts(region: NDArray[np.bool_], left: int, top: int, size_hw: tuple[int, int]) -> NDArray[np.int64]:
    """Return alternating run lengths of 0s and 1s down the columns of an image that is 0 outside `region`."""
    height, width = size_hw
    bordered = np.pad(region, ((1, 1), (0, 0)))
    column, row = np.nonzero((bordered[1:] != bordered[:-1]).T)
    changes = (left + column) * height + top + row
    # Equal changes: a column that ends with 1s precedes a column that starts with 1s.
    changes = changes[(np.diff(changes, prepend=-1) != 0) & (np.diff(changes, append=-1) != 0)]
    lengths: NDArray[np.int64] = np.diff(changes, prepend=0, append=height * width)
    return lengths if lengths[-1] else lengths[:-1]
