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


@pytest.mark.parametrize("threshold", [0.5, 0.6])  # float32 rounds 0.6 up
@pytest.mark.parametrize("drop_equal", [False, True])
def test_keep_mask_equals_nms(drop_equal, threshold, python_loops):
    boxes = make_boxes(6, 40)
    valid = torch.rand(6, 40, generator=torch.Generator().manual_seed(1)) < 0.8
    keep = nms_keep_mask(boxes, valid, threshold, drop_equal=drop_equal)
    assert torch.equal(keep, nms(boxes, valid, threshold, drop_equal=drop_equal))
    assert 0 < keep.sum() < valid.sum()


@pytest.mark.parametrize("threshold", [0.5, 0.6])
@pytest.mark.parametrize("count", [5, 200])
def test_best_boxes_equal_nms_by_label(count, threshold, python_loops):
    """Also with equal scores, and with more slots than boxes."""
    boxes = make_boxes(2, 90)
    generator = torch.Generator().manual_seed(2)
    scores, labels = torch.randint(0, 9, (2, 90), generator=generator) / 10, torch.arange(3).repeat(2, 30)
    top, index = select_best(boxes, scores, labels, threshold, count)
    for image in range(2):
        order = scores[image].argsort(descending=True, stable=True)
        order = order[scores[image, order] > 0]
        kept = ops.batched_nms(boxes[image, order], -torch.arange(len(order)).float(), labels[image, order], threshold)
        expected = order[kept][:count]
        assert index[image].tolist() == expected.tolist() + [0] * (count - len(expected))
        assert torch.equal(top[image, : len(expected)], scores[image, expected])
        assert not top[image, len(expected) :].any()


def test_no_candidate_gives_no_box(python_loops):
    top, index = select_best(make_boxes(2, 5), torch.zeros(2, 5), torch.ones(2, 5, dtype=torch.int64), 0.5, 4)
    assert not top.any()
    assert index.shape == (2, 4)
