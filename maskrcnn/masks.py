"""Masks: rasterize ground-truth polygons within ROIs on the device, and paste predicted masks onto their image.

No mask is stored at the size of its image. V vertices of a mask, R ROIs, D detections, S side of a mask (28).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detection.data import rle
from detection.data.coco import Split
from detection.data.rle import CocoRle
from detection.runtime.device import supports_float64

# Edges times columns of the ROIs that are rasterized at once: bounds memory for very long polygons.
MAX_CROSSINGS_PER_CHUNK = 2**21

MASK_SIZE = 28

Floats = NDArray[np.float32]


def mask_vertices(split: Split, index: int) -> list[Floats]:
    """Return the mask of each box of an image as vertices (V, 3): x and y in pixels, and the polygon's number from 1.

    Every polygon ends with its first vertex. A mask is the union of its polygons, each filled by the even-odd rule.
    """
    polygons = split.polygons
    assert polygons is not None, "the split was read without masks"
    ring_offsets = polygons.ring_offsets[split.box_offsets[index] : split.box_offsets[index + 1] + 1]
    point_offsets = polygons.point_offsets[ring_offsets[0] : ring_offsets[-1] + 1]
    points_xy = polygons.points_xy[point_offsets[0] : point_offsets[-1]]
    ring_counts = np.diff(ring_offsets)
    numbers = np.arange(1, len(point_offsets)) - np.repeat(ring_offsets[:-1] - ring_offsets[0], ring_counts)
    numbers = np.repeat(numbers.astype(np.float32), np.diff(point_offsets))
    ends_per_box = point_offsets[ring_offsets[1:] - ring_offsets[0]] - point_offsets[0]
    return np.split(np.column_stack([points_xy, numbers]), ends_per_box)[:-1]


def rasterize_polygons(vertices: Tensor, rois_xyxy: Tensor, size: int = MASK_SIZE) -> Tensor:
    """Rasterize masks within their ROIs: (R, size, size) float32 of 0 and 1, on any device, without a host sync.

    vertices: (R, V, 3) of the mask of each ROI, as from `mask_vertices`, padded with zeros. rois_xyxy: (R, 4) in the
    same pixels. The bits are those of the MLPerf reference: it moves and scales polygons in float32, counts sides
    below 1 as 1, and draws with pycocotools' rleFrPoly. Ties may differ on devices without float64.
    """
    rois_xyxy = rois_xyxy.float()
    extents = (rois_xyxy[:, 2:] - rois_xyxy[:, :2]).clamp(min=1)
    scale = torch.full_like(extents, size) / extents  # size / extents would multiply by a rounded reciprocal
    polygon = vertices[..., 2]
    on_grid = (vertices[..., :2] - rois_xyxy[:, None, :2]) * scale[:, None]
    rois_per_chunk = max(1, MAX_CROSSINGS_PER_CHUNK // (vertices.shape[1] * size))
    chunks = zip(on_grid.split(rois_per_chunk), polygon.split(rois_per_chunk), strict=True)
    return torch.cat([_fill_polygons(*chunk, size) for chunk in chunks])


def _fill_polygons(on_grid: Tensor, polygon: Tensor, size: int) -> Tensor:
    """Fill polygons like pycocotools' rleFrPoly: (R, size, size) from vertices (R, V, 2) and polygon numbers (R, V).

    rleFrPoly rounds vertices to fifths of a cell. It walks along each edge in such steps, and notes the row at which
    the walk crosses the center of a column. The cells between the first and second crossing of a column by a polygon
    are inside, and those between the third and the fourth.
    """
    num_rois, num_vertices = polygon.shape
    fifths = (on_grid.to(torch.float64 if supports_float64(on_grid.device) else torch.float32) * 5 + 0.5).trunc()
    (x0, y0), (x1, y1) = fifths[:, :-1].unbind(2), fifths[:, 1:].unbind(2)
    first, last = _cells(torch.minimum(x0, x1), size), _cells(torch.maximum(x0, x1), size)
    last = torch.where(polygon[:, :-1] == polygon[:, 1:], last, first)
    # A number for each polygon of each ROI, and one for the padding.
    group = polygon[:, :-1] + torch.arange(num_rois, device=polygon.device)[:, None] * num_vertices

    # The number of crossings is known on the CPU. Elsewhere, take every column of every edge.
    select = _crossed_columns if on_grid.device.type == "cpu" else _all_columns
    edge, column = select(first.flatten(), last.flatten(), size)
    x0, y0, x1, y1, first, last, group = (part.flatten()[edge] for part in (x0, y0, x1, y1, first, last, group))
    is_crossed = (first <= column) & (column < last)
    row = _cells(_crossing_y(x0, y0, x1, y1, 5 * column + 2.5), size)

    # A closed polygon crosses a column an even number of times. In order, crossings alternately enter and leave it.
    cells_per_roi = size * (size + 1)  # one more row for crossings below the ROI
    order = group.long() * cells_per_roi + (column * (size + 1) + row).long()
    order = torch.where(is_crossed, order, num_rois * num_vertices * cells_per_roi).flatten().sort().values
    cell = order // (num_vertices * cells_per_roi) * cells_per_roi + order % cells_per_roi
    signs = 1.0 - 2.0 * (torch.arange(len(order), device=order.device) % 2)
    crossings = signs.new_zeros(num_rois * cells_per_roi + 1).scatter_add_(0, cell, signs)  # the last is no crossing
    num_polygons = crossings[:-1].view(num_rois, size, size + 1)[..., :size].cumsum(dim=2)
    return (num_polygons > 0).float().mT


def _cells(fifths: Tensor, size: int) -> Tensor:
    """Return the first cell whose center is at or after a whole number of fifths, from 0 to `size`."""
    return ((fifths + 2) / 5).floor().clamp(0, size)


def _crossed_columns(first: Tensor, last: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return edge and column, both (N,), of each crossing; edges (E,) cross the columns from `first` to before `last`.

    Reads the number of crossings, so it waits for a device.
    """
    counts = (last - first).long()
    edge = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    number = torch.arange(len(edge), device=edge.device) - (counts.cumsum(0) - counts)[edge]
    return edge, first[edge] + number


def _all_columns(first: Tensor, last: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return every edge (E, 1) and every column (size,)."""
    device = first.device
    return torch.arange(len(first), device=device)[:, None], torch.arange(size, dtype=first.dtype, device=device)


def _crossing_y(x0: Tensor, y0: Tensor, x1: Tensor, y1: Tensor, center: Tensor) -> Tensor:
    """Return the smaller y, a whole number, of rleFrPoly's two steps next to each edge's crossing of x = center.

    All in fifths of a cell. rleFrPoly steps along the longer side from its smaller end, and rounds the other
    coordinate. Ties fall as in its float64 arithmetic.
    """
    dx, dy = x1 - x0, y1 - y0
    is_flat = dx.abs() >= dy.abs()
    run, rise = torch.where(is_flat, dx, dy), torch.where(is_flat, dy, dx)
    slope = rise / run
    x, y = torch.where(run < 0, x1, x0), torch.where(run < 0, y1, y0)
    # Along y, this is one of the two steps, and a comparison tells which.
    step = torch.where(is_flat, center - 0.5 - x + (slope < 0), ((center - x) / slope).round())
    other = torch.where(is_flat, y, x) + slope * step
    is_behind = (other >= center) == (slope > 0)
    return torch.where(is_flat, (other + 0.5).floor(), y + step - is_behind.to(y))


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
    first, last = (center - half).astype(np.int64), (center + half).astype(np.int64)
    taps = [_resize_taps(first[:, axis], last[:, axis], limit, side) for axis, limit in enumerate((width, height))]
    pasted = []
    for mask, (left, top), (x0, x1, x_weight), (y0, y1, y_weight) in zip(
        padded, first.clip(min=0).tolist(), *taps, strict=True
    ):
        columns = mask[:, x0] * (1 - x_weight) + mask[:, x1] * x_weight
        upper, lower = columns[y0], columns[y1]
        upper *= 1 - y_weight[:, None]
        lower *= y_weight[:, None]
        upper += lower
        pasted.append(rle.encode_rle(_rle_counts(upper > threshold, left, top, size_hw), size_hw))
    return pasted


def _resize_taps(
    first: NDArray[np.int64], last: NDArray[np.int64], limit: int, side: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64], Floats]]:
    """Return two mask cells and the weight of the second, for the pixels `first` to `last` in the image of each box."""
    start, stop = first.clip(min=0), (last + 1).clip(max=limit)
    counts = (stop - start).clip(min=0)
    ends = counts.cumsum()
    pixels = np.arange(counts.sum()) - np.repeat(ends - counts + first - start, counts)
    scale = np.repeat(np.float32(side) / (last - first + 1).clip(min=1).astype(np.float32), counts)
    position = np.maximum((pixels.astype(np.float32) + np.float32(0.5)) * scale - np.float32(0.5), np.float32(0))
    low = position.astype(np.int64)
    taps = low, np.minimum(low + 1, side - 1), position - low.astype(np.float32)
    return list(zip(*(np.split(tap, ends)[:-1] for tap in taps), strict=True))


def _rle_counts(region: NDArray[np.bool_], left: int, top: int, size_hw: tuple[int, int]) -> NDArray[np.int64]:
    """Return alternating run lengths of 0s and 1s down the columns of an image that is 0 outside `region`."""
    height, width = size_hw
    rows, columns = region.shape
    bordered = np.zeros((columns, rows + 2), dtype=bool)
    bordered[:, 1:-1] = region.T
    changes = np.flatnonzero(bordered[:, 1:] != bordered[:, :-1])
    changes += changes // (rows + 1) * (height - rows - 1) + left * height + top
    same = np.flatnonzero(changes[1:] == changes[:-1])
    if len(same):  # a column that ends with 1s precedes a column that starts with 1s
        changes = np.delete(changes, np.concatenate([same, same + 1]))
    ends = np.concatenate([[0], changes, [height * width]])
    lengths: NDArray[np.int64] = ends[1:] - ends[:-1]
    return lengths if lengths[-1] else lengths[:-1]
