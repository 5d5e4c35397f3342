"""Masks of the boxes of a data set as rings of points, from polygons and RLE alike.

Shapes: M boxes, R rings, P points.
"""

import math
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from detection.data import coco_json, rle
from detection.data.coco_json import Columns
from detection.data.rle import InvalidMask, RleSegmentation

_Segmentation = list[list[float]] | RleSegmentation | None
_SEGMENTATION = msgspec.json.Decoder(_Segmentation)


@dataclass(frozen=True, eq=False)
class PolygonArrays:
    """Masks of M boxes as rings of points x, y in pixels. Pixel i spans i to i + 1.

    A mask is the union of its rings, each filled by the even-odd rule. A ring is closed: it ends at its first point and
    has at least 4 points. RLE becomes one ring, as in `rle.runs_to_polygon`.
    """

    ring_offsets: NDArray[np.int64]
    """(M + 1,): the rings of box i are ring_offsets[i] to ring_offsets[i + 1]. A crowd has none."""
    point_offsets: NDArray[np.int64]
    """(R + 1,): the points of ring i are point_offsets[i] to point_offsets[i + 1]."""
    points_xy: NDArray[np.float32]
    """(P, 2)."""

    def keep_boxes(self, keep: NDArray[np.bool_]) -> "PolygonArrays":
        """Return the masks of the boxes where keep (M,) is True."""
        ring_counts, point_counts = np.diff(self.ring_offsets), np.diff(self.point_offsets)
        keep_ring = np.repeat(keep, ring_counts)
        return PolygonArrays(
            ring_offsets=offsets(ring_counts[keep]),
            point_offsets=offsets(point_counts[keep_ring]),
            points_xy=self.points_xy if keep_ring.all() else self.points_xy[np.repeat(keep_ring, point_counts)],
        )


def read(
    annotation_file: Path, columns: Columns, rows: NDArray[np.int64], sizes_hw: NDArray[np.int64]
) -> PolygonArrays:
    """Read the masks of the annotations `rows`, in that order.

    sizes_hw: image size per row of the file, (rows of the file, 2). Raises InputError with the number of invalid
    segmentations and the first of them.
    """
    points, ring_lengths = array("f"), array("q")
    ring_counts = np.zeros(len(rows), dtype=np.int64)
    invalid: list[str] = []
    for position, row in enumerate(rows.tolist()):
        num_before = len(ring_lengths)
        try:
            mask = _decode_segmentation(columns.segmentations[row])
            if isinstance(mask, RleSegmentation):
                runs = rle.rle_to_runs(mask, sizes_hw[row])
                if not columns.is_crowd[row]:
                    outline = rle.runs_to_polygon(runs, int(sizes_hw[row, 0]))
                    points.frombytes(outline.tobytes())
                    ring_lengths.extend([len(outline)] * bool(len(outline)))
            else:
                for polygon in mask:
                    _check_polygon(polygon)
                for polygon in () if columns.is_crowd[row] else mask:
                    points.extend(polygon)
                    points.extend(polygon[:2])
                    ring_lengths.append(len(polygon) // 2 + 1)
        except InvalidMask as error:
            invalid.append(f"annotation {columns.annotation_ids[row]}, image_id {columns.box_image_ids[row]}: {error}")
        ring_counts[position] = len(ring_lengths) - num_before
    if invalid:
        coco_json.raise_if_any(
            annotation_file,
            [f"annotations with an invalid segmentation: {len(invalid)} of {len(rows)} (first: {invalid[0]})"],
        )
    return PolygonArrays(
        ring_offsets=offsets(ring_counts),
        point_offsets=offsets(np.array(ring_lengths)),
        points_xy=np.array(points).reshape(-1, 2),
    )


def _decode_segmentation(value: Any) -> list[list[float]] | RleSegmentation:
    try:
        mask = _SEGMENTATION.decode(value) if isinstance(value, msgspec.Raw) else msgspec.convert(value, _Segmentation)
    except (msgspec.DecodeError, OverflowError, RecursionError, UnicodeError):
        raise InvalidMask("neither polygons nor RLE") from None
    if not mask:
        raise InvalidMask("it is missing" if mask is None else "it has no polygon")
    return mask


def _check_polygon(polygon: list[float]) -> None:
    if len(polygon) % 2:
        raise InvalidMask(f"a polygon of {len(polygon)} coordinates, an odd number")
    if len(polygon) < 6:
        raise InvalidMask(f"a polygon of {len(polygon) // 2} points, fewer than 3")
    if not all(map(math.isfinite, polygon)):
        raise InvalidMask("a polygon with NaN or infinity")


def offsets(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the start of each group of rows and the end of the last: counts (G,) to offsets (G + 1,)."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
