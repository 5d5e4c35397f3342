"""Masks: ground truth as edges, drawn in a region of interest on the device; predictions laid onto their image.

No mask is held at the size of its image. E edges of a mask, R regions, D detections, S side of a mask (28).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detection.data import rle
from detection.data.coco import Split
from detection.data.rle import CompressedMask

# Edges that are held against the rows of their regions at once: it bounds memory where an outline is very long.
EDGES_AT_ONCE = 256

MASK_SIZE = 28

Floats = NDArray[np.float32]


def edges_of(split: Split, index: int) -> list[Floats]:
    """The mask of each box of an image as signed edges (E, 4): x0, y0, x1, y1 in pixels of the image.

    A point is inside where its winding number is not 0: of the edges left of it those that go down, less those that
    go up. Every polygon is turned so that its left side goes down, so that where two overlap both count. Edges
    without a height cross nothing, and are left out.
    """
    outlines = split.outlines
    assert outlines is not None, "the split was read without masks"
    line_starts = outlines.line_starts[split.box_starts[index] : split.box_starts[index + 1] + 1]
    point_starts = outlines.point_starts[line_starts[0] : line_starts[-1] + 1]
    points_xy = outlines.points_xy[point_starts[0] : point_starts[-1]]
    line_starts, point_starts = line_starts - line_starts[0], point_starts - point_starts[0]

    point_counts = np.diff(point_starts)
    line = np.repeat(np.arange(len(point_counts)), point_counts)  # of each point
    box = np.repeat(np.arange(len(line_starts) - 1), np.diff(line_starts))[line]
    from_first = points_xy.astype(np.float64) - points_xy[point_starts[line]]  # small numbers, for exact areas
    points = np.arange(len(line))
    here, after = np.delete(points, point_starts[1:] - 1), np.delete(points, point_starts[:-1])
    (x0, y0), (x1, y1) = from_first[here].T, from_first[after].T
    areas = np.bincount(line[here], x0 * y1 - x1 * y0, minlength=len(point_counts))  # of lines of two points 0
    turned = (areas > 0)[line[here]]
    begin, end = np.where(turned, after, here), np.where(turned, here, after)
    edges = np.concatenate([points_xy[begin], points_xy[end]], axis=1)
    kept = edges[:, 1] != edges[:, 3]
    stops = np.searchsorted(box[here][kept], np.arange(len(line_starts) - 1), side="right")
    return np.split(edges[kept], stops)[:-1]


def rasterise(edges: Tensor, rois_xyxy: Tensor, size: int = MASK_SIZE) -> Tensor:
    """What masks are in their regions: (R, size, size) float32 of 0 and 1, on any device, without waiting for it.

    edges: (R, E, 4) of the mask of each region, as `edges_of`; one without a height is padding. rois_xyxy: (R, 4) in
    the same pixels; a side below 1 is taken for 1, as in the reference. A cell of the region's grid is 1 where its
    middle is inside.
    """
    rois_xyxy = rois_xyxy.float()
    corners, extents = rois_xyxy[:, :2], (rois_xyxy[:, 2:] - rois_xyxy[:, :2]).clamp(min=1)
    on_grid = (edges.float() - corners.repeat(1, 2)[:, None]) * (size / extents).repeat(1, 2)[:, None]
    row = torch.arange(size, device=edges.device)
    middle = row + 0.5
    crossings = on_grid.new_zeros(len(edges), size * (size + 1))  # a column more, for what is right of the region
    for part in on_grid.split(EDGES_AT_ONCE, dim=1):
        x0, y0, x1, y1 = part.unsqueeze(-1).unbind(2)
        down, up = (y0 <= middle) & (middle < y1), (y1 <= middle) & (middle < y0)
        share = (middle - y0) / torch.where(y0 == y1, 1.0, y1 - y0)
        x = torch.where(down | up, x0 + share * (x1 - x0), 0.0)
        column = (x - 0.5).ceil().clamp(0, size).long()
        signs = down.float() - up.float()
        crossings.scatter_add_(1, (row * (size + 1) + column).flatten(1), signs.flatten(1))
    winding = crossings.view(-1, size, size + 1)[..., :size].cumsum(dim=-1)
    return (winding != 0).float()


def paste(masks: Floats, boxes_xyxy: Floats, size_hw: tuple[int, int], threshold: float = 0.5) -> list[CompressedMask]:
    """Lay masks onto their image, each as COCO's compressed run lengths.

    masks: (D, S, S) probabilities. boxes_xyxy: (D, 4) float32 in pixels of the image, whose size is `size_hw`. As the
    reference does: mask and box are widened by a pixel of the mask on each side, the box is cut to whole pixels, both
    ends within, and the mask is 1 where it is above the threshold when resized to it bilinearly. Only the box's part
    of the image is computed.
    """
    height, width = size_hw
    side = masks.shape[-1] + 2
    padded = np.pad(masks.astype(np.float32), ((0, 0), (1, 1), (1, 1)))
    low, high = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    half, centre = (high - low) * np.float32(0.5), (high + low) * np.float32(0.5)
    half *= np.float32(side / (side - 2))
    corners = np.concatenate([centre - half, centre + half], axis=1).astype(np.int64).tolist()
    pasted = []
    for mask, (left, top, right, bottom) in zip(padded, corners, strict=True):
        x0, x1, across = _between(left, right, width, side)
        y0, y1, down = _between(top, bottom, height, side)
        wide = mask[:, x0] * (1 - across) + mask[:, x1] * across
        region = wide[y0] * (1 - down[:, None]) + wide[y1] * down[:, None] > threshold
        pasted.append(rle.compress(_run_lengths(region, max(left, 0), max(top, 0), size_hw), size_hw))
    return pasted


def _between(first: int, last: int, limit: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """For each pixel from `first` to `last` that is on the image: the two cells that it is between, and how far on."""
    length = max(last - first + 1, 1)
    pixels = np.arange(max(first, 0), min(last + 1, limit)) - first
    scale = np.float32(side) / np.float32(length)
    place = np.maximum((pixels.astype(np.float32) + np.float32(0.5)) * scale - np.float32(0.5), np.float32(0))
    before = place.astype(np.int64)
    return before, np.minimum(before + 1, side - 1), place - before.astype(np.float32)


def _run_lengths(region: NDArray[np.bool_], left: int, top: int, size_hw: tuple[int, int]) -> NDArray[np.int64]:
    """Lengths of 0s and 1s in turn down the columns of an image that is 0 but for a region at (left, top)."""
    height, width = size_hw
    bordered = np.pad(region, ((1, 1), (0, 0)))
    column, row = np.nonzero((bordered[1:] != bordered[:-1]).T)
    changes = (left + column) * height + top + row
    # Twice the same is a column that ends with 1s before one that begins with them.
    changes = changes[(np.diff(changes, prepend=-1) != 0) & (np.diff(changes, append=-1) != 0)]
    lengths: NDArray[np.int64] = np.diff(changes, prepend=0, append=height * width)
    return lengths if lengths[-1] else lengths[:-1]
