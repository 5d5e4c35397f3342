import numpy as np
import pytest

from detection.data.box_checks import suspect_boxes

NUM_BOXES = 200


def make_boxes(min_side=5, max_side=60):
    """Return boxes (M, 4) xywh within images of 200 × 150 pixels, and the sizes (M, 2) of these images."""
    rng = np.random.default_rng(0)
    sizes_hw = np.tile([150, 200], (NUM_BOXES, 1))
    sides = rng.uniform(min_side, max_side, (NUM_BOXES, 2))
    left_top = rng.uniform(0, 1, (NUM_BOXES, 2)) * (sizes_hw[:, ::-1] - sides)
    return np.concatenate([left_top, sides], axis=1), sizes_hw


def suspect(boxes, sizes_hw):
    return suspect_boxes(boxes, sizes_hw[::4], np.arange(NUM_BOXES) // 4)


@pytest.mark.parametrize(("min_side", "max_side"), [(5, 60), (100, 149), (0.5, 1.5), (149, 149)])
def test_plausible_boxes_are_accepted(min_side, max_side):
    boxes, sizes_hw = make_boxes(min_side, max_side)
    assert suspect(boxes, sizes_hw) is None
    few_beyond = boxes.copy()
    few_beyond[:10, 2] += 300  # 5% of them
    assert suspect(few_beyond, sizes_hw) is None
    assert suspect_boxes(boxes[:0], sizes_hw, np.arange(0)) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], 1), "they look like corners [x1, y1, x2, y2]"),
        (lambda b: np.concatenate([b[:, :2] + b[:, 2:] / 2, b[:, 2:]], 1), "[center x, center y, width, height]"),
        (lambda b: b[:, [1, 0, 3, 2]], "they look like [y, x, height, width]"),
        (lambda b: b / [200, 150, 200, 150], "all 200 boxes lie within 0 to 1: they look normalized"),
        (lambda b: b / 100, "all 200 boxes are smaller than one pixel"),
        (lambda b: b * 3, "check that 'bbox' is [x, y, width, height] in pixels"),
    ],
)
def test_suspicious_boxes_are_reported_with_the_likely_cause(change, message):
    boxes, sizes_hw = make_boxes()
    warning = suspect(change(boxes), sizes_hw)
    assert message in warning
    assert warning.count(" or ") == 0


def test_counts_of_boxes_and_images_are_stated():
    boxes, sizes_hw = make_boxes()
    boxes[:120, 2] += 300
    assert suspect(boxes, sizes_hw).startswith("120 of 200 boxes, in 30 of 50 images with boxes, extend beyond")
    boxes[100:120, 2] -= 300
    assert suspect(boxes, sizes_hw) is None
