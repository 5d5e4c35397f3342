"""Tests of NMS for exported networks, which should equal the program's own."""

import pytest
import torch
from torchvision import ops

from detection.nn.nms import nms
from detection.nn.traceable_nms import nms_keep_mask, select_best


def make_boxes(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 20, (*shape, 2), generator=generator).float()
    return torch.cat([corners, corners + torch.randint(1, 12, (*shape, 2), generator=generator)], dim=-1)


@pytest.mark.parametrize("drop_equal", [False, True])
def test_keep_mask_equals_nms(drop_equal):
    boxes = make_boxes(6, 40)
    valid = torch.rand(6, 40, generator=torch.Generator().manual_seed(1)) < 0.8
    keep = nms_keep_mask(boxes, valid, 0.5, drop_equal=drop_equal)
    assert torch.equal(keep, nms(boxes, valid, 0.5, drop_equal=drop_equal))
    assert 0 < keep.sum() < valid.sum()


@pytest.mark.parametrize("count", [5, 200])
def test_best_boxes_equal_nms_by_class(count):
    """Also with equal scores, and with more slots than boxes."""
    batch, classes, width = 2, 3, 30
    boxes = make_boxes(batch, classes, width)
    scores = torch.randint(0, 9, (batch, classes, width), generator=torch.Generator().manual_seed(2)) / 10
    top, index = select_best(boxes, scores, 0.5, count)
    for image in range(batch):
        rows = []
        for label in range(classes):
            order = scores[image, label].argsort(descending=True, stable=True)
            order = order[scores[image, label, order] > 0]
            kept = order[ops.nms(boxes[image, label, order], -torch.arange(len(order)).float(), 0.5)]
            rows += [(-float(scores[image, label, box]), label * width + box) for box in kept.tolist()]
        expected = sorted(rows)[:count]
        assert [(-score, box) for score, box in zip(top[image].tolist(), index[image].tolist(), strict=True)][
            : len(expected)
        ] == expected
        assert not top[image, len(expected) :].any()


def test_no_candidate_gives_no_box():
    top, index = select_best(make_boxes(2, 3, 5), torch.zeros(2, 3, 5), 0.5, 4)
    assert not top.any()
    assert index.shape == (2, 4)
