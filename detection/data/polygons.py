"""The masks of the boxes of a data set as lines in the images, from polygons and run lengths alike.

Shapes: M boxes, L lines, P points.
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
from detection.data.rle import NoMask, RunLengths

_Segmentation = list[list[float]] | RunLengths | None
_SEGMENTATION = msgspec.json.Decoder(_Segmentation)


@dataclass(frozen=True, eq=False)
class Outlines:
    """The masks of M boxes as lines in the image: x, y in pixels, a pixel reaching from its number to the next.

    A line from a polygon ends where it begins, and has 4 points or more, turning either way round. Lines from run
    lengths have 2 points each, one above the other: left borders go down and right borders up.
    """

    line_starts: NDArray[np.int64]
    """(M + 1,): the lines of box i are line_starts[i] to line_starts[i + 1]; a crowd has none."""
    point_starts: NDArray[np.int64]
    """(L + 1,): the points of line i are point_starts[i] to point_starts[i + 1]."""
    points_xy: NDArray[np.float32]
    """(P, 2)."""


def read(annotation_file: Path, columns: Columns, rows: NDArray[np.int64], sizes_hw: NDArray[np.int64]) -> Outlines:
    """The masks of these rows of the annotations, in their order; sizes_hw: (rows of the file, 2) of their images.

    Raises InputError that counts the segmentations that are none, and names the first.
    """
    points, line_lengths = array("f"), array("q")
    line_counts = np.zeros(len(rows), dtype=np.int64)
    wrong: list[str] = []
    for place, row in enumerate(rows.tolist()):
        before = len(line_lengths)
        try:
            mask = _decode_segmentation(columns.segmentations[row])
            if isinstance(mask, RunLengths):
                runs = rle.runs(mask, sizes_hw[row])
                if not columns.crowd[row]:
                    borders = rle.borders(runs, int(sizes_hw[row, 0]))
                    points.frombytes(borders.tobytes())
                    line_lengths.extend([2] * len(borders))
            else:
                for polygon in mask:
                    _check_polygon(polygon)
                for polygon in () if columns.crowd[row] else mask:
                    points.extend(polygon)
                    points.extend(polygon[:2])
                    line_lengths.append(len(polygon) // 2 + 1)
        except NoMask as error:
            wrong.append(f"annotation {columns.annotation_ids[row]}, image_id {columns.box_image_ids[row]}: {error}")
        line_counts[place] = len(line_lengths) - before
    if wrong:
        coco_json.refuse(
            annotation_file,
            [f"annotations whose segmentation is no mask: {len(wrong)} of {len(rows)} (first: {wrong[0]})"],
        )
    return Outlines(
        line_starts=starts(line_counts),
        point_starts=starts(np.array(line_lengths)),
        points_xy=np.array(points).reshape(-1, 2),
    )


def _decode_segmentation(value: Any) -> list[list[float]] | RunLengths:
    try:
        mask = _SEGMENTATION.decode(value) if isinstance(value, msgspec.Raw) else msgspec.convert(value, _Segmentation)
    except (msgspec.DecodeError, OverflowError, RecursionError, UnicodeError):
        raise NoMask("neither polygons nor run lengths") from None
    if not mask:
        raise NoMask("it is missing" if mask is None else "no polygon is in it")
    return mask


def _check_polygon(polygon: list[float]) -> None:
    if len(polygon) % 2:
        raise NoMask(f"a polygon of {len(polygon)} coordinates, which is odd")
    if len(polygon) < 6:
        raise NoMask(f"a polygon of {len(polygon) // 2} points, where 3 are the least")
    if not all(map(math.isfinite, polygon)):
        raise NoMask("a polygon with NaN or infinity")


def starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(groups + 1,): where each of as many rows begins among all, and where the last one ends; counts: (groups,)."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
