"""Run-length encoded (RLE) masks, column by column, as in COCO's annotation and result files."""

from collections.abc import Sequence
from typing import Any, TypedDict

import msgspec
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_api


class CocoRle(TypedDict):
    """Compressed RLE of one mask, as in COCO's results format. `size` is the image height and width."""

    size: list[int]
    counts: str


class RleSegmentation(msgspec.Struct, gc=False):
    """RLE of an annotation file: alternating lengths of 0s and 1s down the columns, as integers or compressed text."""

    size: tuple[int, int]
    counts: list[int] | str


class InvalidMask(ValueError):
    """Invalid segmentation."""


def rle_to_runs(segmentation: RleSegmentation, size_hw: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return start and stop of each run of 1s, in pixels counted down the columns of the image: (runs, 2).

    Raises InvalidMask if the RLE does not fit the image size.
    """
    height, width = size_hw.tolist()
    if segmentation.size != (height, width):
        raise InvalidMask(
            f"RLE of {segmentation.size[1]}×{segmentation.size[0]} pixels, but the image has {width}×{height}"
        )
    counts = _decode_counts(segmentation.counts) if isinstance(segmentation.counts, str) else segmentation.counts
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise InvalidMask(f"RLE that does not add up to {width}×{height} pixels")
    ends = np.cumsum(counts)
    return ends[: len(ends) // 2 * 2].reshape(-1, 2)


def _decode_counts(text: str) -> list[int]:
    """Decode COCO's compressed text to run lengths.

    A character holds six bits. A value is the difference to the last but one run length.
    pycocotools decodes to a bitmap only, and its result for a truncated text is undefined.
    """
    counts: list[int] = []
    value = shift = 0
    for code in text.encode():
        bits = code - 48
        if not 0 <= bits < 64 or shift > 60:
            raise InvalidMask("RLE text that is not in COCO's format")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise InvalidMask("RLE text that is truncated")
    return counts


def runs_to_polygon(runs: NDArray[np.int64], height: int) -> NDArray[np.float32]:
    """Convert runs to one closed polygon (P, 2) of x, y, to be filled by the even-odd rule; (0, 2) without runs.

    It moves right along the first top of each column, then left along all other tops and bottoms. Sides in between are
    vertical, and cross no column.
    """
    runs = runs[runs[:, 0] < runs[:, 1]]
    if not len(runs):
        return np.zeros((0, 2), dtype=np.float32)
    first, last = runs[:, 0] // height, (runs[:, 1] - 1) // height
    counts = last - first + 1
    columns = np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)
    sides = (np.repeat(runs, counts, axis=0) - columns[:, None] * height).clip(0, height)
    empty = np.setdiff1d(np.arange(first[0], last[-1]), columns)  # crossed twice at the same y
    columns, sides = np.concatenate([columns, empty]), np.concatenate([sides, np.zeros((len(empty), 2), np.int64)])
    order = np.argsort(columns, kind="stable")

    x, y = np.repeat(columns[order], 2), sides[order].ravel()  # tops at even positions, bottoms at odd ones
    is_first = np.diff(x, prepend=-1) > 0
    others = np.flatnonzero(~is_first)
    path = np.concatenate([np.flatnonzero(is_first), others[np.argsort(-x[others], kind="stable")]])
    is_bottom = path % 2
    x = np.stack([x[path] + is_bottom, x[path] + 1 - is_bottom], axis=1).ravel()
    y = np.repeat(y[path], 2)
    x, y = np.append(x, x[0]), np.append(y, y[0])
    turns = np.diff(y, prepend=-1) | np.diff(y, append=-1)  # other points lie between two of the same y
    return np.stack([x, y], axis=1)[turns != 0].astype(np.float32)


def fill_polygons(polygons: Sequence[NDArray[np.float64]], size_hw: tuple[int, int]) -> CocoRle:
    """Return the mask of one box: the union of its closed polygons (P, 2) of x, y."""
    merged: Any = mask_api.merge(mask_api.frPyObjects([points[:-1].ravel().tolist() for points in polygons], *size_hw))
    return {"size": list(size_hw), "counts": merged["counts"].decode()}


def encode_rle(run_lengths: NDArray[np.int64], size_hw: tuple[int, int]) -> CocoRle:
    """Encode alternating run lengths of 0s and 1s, 0s first, down the columns, as COCO's compressed text."""
    uncompressed = {"size": list(size_hw), "counts": run_lengths.tolist()}
    return {"size": list(size_hw), "counts": mask_api.frPyObjects(uncompressed, *size_hw)["counts"].decode()}


def decode_mask(mask: CocoRle) -> NDArray[np.uint8]:
    """Decode a mask to (H, W) of 0 and 1."""
    pixels: NDArray[np.uint8] = mask_api.decode(mask)
    return pixels
