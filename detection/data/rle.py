"""Masks of objects by run lengths down the columns of their image, as COCO's files and results have them."""

from collections.abc import Sequence
from typing import Any, TypedDict

import msgspec
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_api


class CompressedMask(TypedDict):
    """The mask of an object as COCO's results format has it: `size` is height and width of the image."""

    size: list[int]
    counts: str


class RunLengths(msgspec.Struct, gc=False):
    """A mask down the columns of its image, as lengths of 0s and 1s in turn, or these in COCO's compressed text."""

    size: tuple[int, int]
    counts: list[int] | str


class NoMask(ValueError):
    """What is wrong with a segmentation."""


def runs(mask: RunLengths, size_hw: NDArray[np.int64]) -> NDArray[np.int64]:
    """(runs, 2): where the runs of ones start and stop, in pixels counted down the columns of the image.

    Raises NoMask where they are not of an image of that size.
    """
    height, width = size_hw.tolist()
    if mask.size != (height, width):
        raise NoMask(f"run lengths of {mask.size[1]}×{mask.size[0]} pixels, and the image has {width}×{height}")
    counts = _decompress(mask.counts) if isinstance(mask.counts, str) else mask.counts
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise NoMask(f"run lengths that do not add up to {width}×{height} pixels")
    ends = np.cumsum(counts)
    return ends[: len(ends) // 2 * 2].reshape(-1, 2)


def _decompress(text: str) -> list[int]:
    """The run lengths of COCO's compressed text: six bits a character, the differences to the last but one.

    pycocotools decodes them, too, but not to numbers, and leaves what a text that is too short does not say undefined.
    """
    counts: list[int] = []
    value = shift = 0
    for code in text.encode():
        bits = code - 48
        if not 0 <= bits < 64 or shift > 60:
            raise NoMask("run lengths in a text that is not COCO's")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise NoMask("run lengths in a text that breaks off")
    return counts


def borders(runs: NDArray[np.int64], height: int) -> NDArray[np.float32]:
    """The runs of `runs` as lines (L, 2, 2) x, y: of each upright rectangle the left border down, the right one up.

    A run that goes on in further columns is cut into its part of the first column, whole columns, and the rest.
    """
    runs = runs[runs[:, 0] < runs[:, 1]]
    (left, top), (right, bottom) = np.divmod(runs[:, 0], height), np.divmod(runs[:, 1] - 1, height)
    within = left == right
    none, whole = np.zeros_like(left), np.full_like(left, height)
    rectangles_xyxy = np.concatenate(
        [
            np.stack([left, top, left + 1, np.where(within, bottom + 1, height)], axis=1),
            np.stack([left + 1, none, right, whole], axis=1)[right > left + 1],
            np.stack([right, none, right + 1, bottom + 1], axis=1)[~within],
        ]
    ).astype(np.float32)
    return rectangles_xyxy[:, [[[0, 1], [0, 3]], [[2, 3], [2, 1]]]].reshape(-1, 2, 2)


def filled(lines: Sequence[NDArray[np.float64]], size_hw: tuple[int, int]) -> CompressedMask:
    """What is inside of a box's lines, those of `Outlines`."""
    if len(lines[0]) == 2:  # left and right borders in turn, as `borders` makes them
        corners = np.concatenate(lines).reshape(-1, 4, 2)
        shapes: Any = np.concatenate([corners[:, 0], corners[:, 2] - corners[:, 0]], axis=1)
    else:
        shapes = [line[:-1].ravel().tolist() for line in lines]
    merged = mask_api.merge(mask_api.frPyObjects(shapes, *size_hw))
    return {"size": list(size_hw), "counts": merged["counts"].decode()}


def compress(run_lengths: NDArray[np.int64], size_hw: tuple[int, int]) -> CompressedMask:
    """A mask's run lengths, down the columns, 0s and 1s in turn, beginning with the 0s, in COCO's compressed text."""
    plain = {"size": list(size_hw), "counts": run_lengths.tolist()}
    return {"size": list(size_hw), "counts": mask_api.frPyObjects(plain, *size_hw)["counts"].decode()}


def bitmap(mask: CompressedMask) -> NDArray[np.uint8]:
    """A mask as (H, W) of 0 and 1."""
    pixels: NDArray[np.uint8] = mask_api.decode(mask)
    return pixels
