"""Tests of non-maximum suppression: all methods are exact for any groups, thresholds and splits."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torchvision import ops

from detection.nn import nms
from detection.nn.nms import grouped_nms, nms_by_group, nms_by_rank, nms_parallel


def padded(method):
    """Return a method for boxes that are sorted by group as one for padded groups."""

    def run(boxes, valid, iou_threshold, *, drop_equal):
        keep = torch.zeros_like(valid)
        group = torch.arange(len(valid))[:, None].expand_as(valid)
        keep[valid] = method(boxes[valid], group[valid], iou_threshold, drop_equal=drop_equal)
        return keep

    return run


METHODS = pytest.mark.parametrize("method", [nms_parallel, nms_by_rank, nms_by_group, padded(grouped_nms), nms.nms])


def random_boxes(*shape, seed=0, grid=0):
    """Return boxes (..., 4) with sides of 5 to 55; on a grid, many overlaps are equal."""
    generator = torch.Generator().manual_seed(seed)
    lower = 100 * torch.rand(*shape, 2, generator=generator)
    boxes = torch.cat([lower, lower + 5 + 50 * torch.rand(*shape, 2, generator=generator)], dim=-1)
    return (boxes / grid).round() * grid if grid else boxes


def drop_one_by_one(iou, valid, threshold, drop_equal):
    """Return the mask (W,) of remaining boxes by the definition of greedy NMS."""
    keep, iou = valid.tolist(), iou.tolist()
    for j in range(len(keep)):
        keep[j] &= not any(
            keep[i] and (iou[i][j] > threshold or (drop_equal and iou[i][j] == threshold)) for i in range(j)
        )
    return keep


@METHODS
@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 30),
    st.integers(1, 3),
    st.sampled_from([0, 25]),
    st.sampled_from([0.5, 0.6, 0.7]),
)
def test_nms_keeps_a_box_exactly_if_no_better_remaining_box_overlaps_it(method, seed, width, groups, grid, threshold):
    boxes = random_boxes(groups, width, seed=seed, grid=grid)
    valid = torch.rand(groups, width, generator=torch.Generator().manual_seed(seed)) < 0.8
    iou = nms.pairwise_iou(boxes, boxes)
    for drop_equal in (False, True):
        keep = method(boxes, valid, threshold, drop_equal=drop_equal)
        expected = [drop_one_by_one(*group, threshold, drop_equal) for group in zip(iou, valid, strict=True)]
        assert keep.tolist() == expected


@METHODS
def test_equal_overlap_is_dropped_only_on_demand(method):
    boxes = torch.tensor([[[0.0, 0, 2, 1], [0, 0, 1, 1], [5, 5, 6, 6]]])  # the IoU of the first two is 1/2
    valid = torch.ones(1, 3, dtype=torch.bool)
    assert method(boxes, valid, 0.5, drop_equal=True).tolist() == [[True, False, True]]
    assert method(boxes, valid, 0.5, drop_equal=False).tolist() == [[True, True, True]]


@METHODS
@pytest.mark.parametrize("parts", [3, 5, 6, 7, 9])
@pytest.mark.parametrize("drop_equal", [False, True])
def test_overlap_at_a_threshold_that_float32_rounds_is_judged_as_in_torchvision(method, parts, drop_equal):
    """float32 rounds 0.6 up and 0.7 down, so that an IoU of 3/5 is above 0.6, and one of 7/10 is below 0.7."""
    boxes, threshold = torch.tensor([[[0.0, 0, 10, 1], [0, 0, parts, 1]]]), parts / 10
    kept = ops.nms(boxes[0], torch.tensor([0.0, -1]), math.nextafter(threshold, 0) if drop_equal else threshold)
    keep = method(boxes, torch.ones(1, 2, dtype=torch.bool), threshold, drop_equal=drop_equal)
    assert int(keep.sum()) == len(kept)


@METHODS
@pytest.mark.parametrize("width", [100, 101])
def test_long_chain_of_overlaps_is_exact(method, width, monkeypatch):
    """Each box overlaps the next, so that the last depends on all, after more rounds than between two tests."""
    monkeypatch.setattr(nms, "ROUNDS_PER_TEST", 4)
    left = torch.arange(width).float()
    boxes = torch.stack([left, 0 * left, left + 3, 0 * left + 1], dim=1)[None]  # IoU with the next 0.5, then 0.2
    keep = method(boxes, torch.ones(1, width, dtype=torch.bool), 0.4, drop_equal=False)
    assert keep.tolist() == [[rank % 2 == 0 for rank in range(width)]]


def test_large_groups_are_exact_and_their_overlaps_computed_in_bounded_memory(monkeypatch):
    boxes, valid = random_boxes(3, 300, seed=1), torch.ones(3, 300, dtype=torch.bool)
    valid[1, 150:] = False
    expected = nms_by_group(boxes, valid, 0.5, drop_equal=False)
    pairs, compute = [], nms.pairwise_iou
    monkeypatch.setattr(nms, "pairwise_iou", lambda a, b: pairs.append(compute(a, b).numel()) or compute(a, b))
    for limit, parts in ((2**25, 1), (300 * 300, 3), (300 * 100, 9)):
        monkeypatch.setattr(nms, "MAX_PAIRS", limit)
        pairs.clear()
        assert torch.equal(nms_parallel(boxes, valid, 0.5, drop_equal=False), expected)
        assert len(pairs) == parts
        assert max(pairs) <= limit
    for group in range(3):
        kept = ops.nms(boxes[group, valid[group]], -torch.arange(int(valid[group].sum())).float(), 0.5)
        assert expected[group].nonzero()[:, 0].tolist() == sorted(kept.tolist())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 200), st.integers(1, 4))
def test_groups_of_any_size_do_not_suppress_each_other(seed, count, groups):
    boxes = random_boxes(count, seed=seed)
    group = torch.randint(0, groups, (count,), generator=torch.Generator().manual_seed(seed)).sort().values
    keep = grouped_nms(boxes, group, 0.5)
    for number in range(groups):
        rows = boxes[group == number]
        everything = torch.ones(len(rows), dtype=torch.bool)
        expected = drop_one_by_one(nms.pairwise_iou(rows, rows), everything, 0.5, False)
        assert keep[group == number].tolist() == expected
