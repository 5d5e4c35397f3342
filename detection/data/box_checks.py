"""Signs that the boxes of an annotation file are in another format than [x, y, width, height] in pixels."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from detection.data.coco_json import Integers

MAX_BOXES = 2**20
TOLERANCE_PX = 1.0
MIN_FRACTION_BEYOND = 0.1
"""Fraction of boxes beyond the border from which they are suspicious. Annotators draw few boxes past the border."""
MIN_FRACTION_IMAGES = 0.5
"""Fraction of images with such boxes from which they are suspicious, even if they fit no other format."""
MIN_FRACTION_FITTING = 0.99
"""Fraction of boxes that must fit their image in another format for it to be the likely one."""


def suspect_boxes(boxes_xywh: NDArray[np.float64], sizes_hw: Integers, box_image: NDArray[np.int64]) -> str | None:
    """Return a warning with the likely cause, or None if the boxes are plausible.

    boxes_xywh: (M, 4) as in the annotation file. sizes_hw: (N, 2) of the images. box_image: (M,) index of the image.
    A sample of the boxes is checked if there are many.
    """
    rows = np.flatnonzero(np.isfinite(boxes_xywh).all(axis=1))
    rows = rows[:: 1 + len(rows) // MAX_BOXES]
    boxes_xywh, box_image = boxes_xywh[rows], box_image[rows]
    if not len(boxes_xywh):
        return None
    if boxes_xywh.min() >= 0 and boxes_xywh.max() <= 1:
        return (
            f"all {len(boxes_xywh)} boxes lie within 0 to 1: they look normalized. Multiply x and width by the image's "
            "width, y and height by its height"
        )
    if (boxes_xywh[:, 2:] < 1).all():
        return f"all {len(boxes_xywh)} boxes are smaller than one pixel: check that 'bbox' is in pixels"
    height, width = sizes_hw[box_image].T
    first, second, third, fourth = boxes_xywh.T
    is_beyond = ~fits(first, second, first + third, second + fourth, width, height)
    if is_beyond.mean() < MIN_FRACTION_BEYOND:
        return None
    fits_as = {
        "corners [x1, y1, x2, y2]": fits(first, second, third, fourth, width, height)
        & (third >= first)
        & (fourth >= second),
        "[center x, center y, width, height]": fits(
            first - third / 2, second - fourth / 2, first + third / 2, second + fourth / 2, width, height
        ),
        "[y, x, height, width]": fits(second, first, second + fourth, first + third, width, height),
    }
    causes = [name for name, is_fitting in fits_as.items() if is_fitting.mean() >= MIN_FRACTION_FITTING]
    num_images, num_images_beyond = len(np.unique(box_image)), len(np.unique(box_image[is_beyond]))
    counts = (
        f"{is_beyond.sum()} of {len(is_beyond)} boxes, in {num_images_beyond} of {num_images} images with boxes, "
        "extend beyond their image"
    )
    if causes:
        return f"{counts}: they look like {' or '.join(causes)}. Convert them to [x, y, width, height]"
    if num_images_beyond <= MIN_FRACTION_IMAGES * num_images:
        return None
    return f"{counts}: check that 'bbox' is [x, y, width, height] in pixels of the image of that 'width' and 'height'"


def fits(
    left: NDArray[np.float64],
    top: NDArray[np.float64],
    right: NDArray[np.float64],
    bottom: NDArray[np.float64],
    width: Integers,
    height: Integers,
) -> NDArray[np.bool_]:
    """Return (M,) True for boxes within their image."""
    inside: NDArray[Any] = (left >= -TOLERANCE_PX) & (top >= -TOLERANCE_PX)
    inside &= (right <= width + TOLERANCE_PX) & (bottom <= height + TOLERANCE_PX)
    return inside
