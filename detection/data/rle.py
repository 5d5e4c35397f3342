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


def runs_to_edges(runs: NDArray[np.int64], height: int) -> NDArray[np.float32]:
    """Convert runs to vertical edges (R, 2, 2) x, y: per rectangle the left edge down, then the right edge up.

    A run over several columns becomes three rectangles: in its first column, the full columns, and the rest.
    """
    runs = runs[runs[:, 0] < runs[:, 1]]
    (left, top), (right, bottom) = np.divmod(runs[:, 0], height), np.divmod(runs[:, 1] - 1, height)
    one_column = left == right
    zero, full = np.zeros_like(left), np.full_like(left, height)
    rectangles_xyxy = np.concatenate(
        [
            np.stack([left, top, left + 1, np.where(one_column, bottom + 1, height)], axis=1),
            np.stack([left + 1, zero, right, full], axis=1)[right > left + 1],
            np.stack([right, zero, right + 1, bottom + 1], axis=1)[~one_column],
        ]
    ).astype(np.float32)
    return rectangles_xyxy[:, [[[0, 1], [0, 3]], [[2, 3], [2, 1]]]].reshape(-1, 2, 2)


def fill_rings(rings: Sequence[NDArray[np.float64]], size_hw: tuple[int, int]) -> CocoRle:
    """Return the mask inside the rings of one box, as in `PolygonArrays`."""
    if len(rings[0]) == 2:  # alternating left and right edges of `runs_to_edges`
        corners = np.concatenate(rings).reshape(-1, 4, 2)
        shapes: Any = np.concatenate([corners[:, 0], corners[:, 2] - corners[:, 0]], axis=1)
    else:
        shapes = [ring[:-1].ravel().tolist() for ring in rings]
    merged = mask_api.merge(mask_api.frPyObjects(shapes, *size_hw))
    return {"size": list(size_hw), "counts": merged["counts"].decode()}


def encode_rle(run_lengths: NDArray[np.int64], size_hw: tuple[int, int]) -> CocoRle:
    """Encode alternating run lengths of 0s and 1s, 0s first, down the columns, as COCO's compressed text."""
    uncompressed = {"size": list(size_hw), "counts": run_lengths.tolist()}
    return {"size": list(size_hw), "counts": mask_api.frPyObjects(uncompressed, *size_hw)["counts"].decode()}


def decode_mask(mask: CocoRle) -> NDArray[np.uint8]:
    """Decode a mask to (H, W) of 0 and 1."""
    pixels: NDArray[np.uint8] = mask_api.decode(mask)
    return pixels
