import hypothesis.strategies as st
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from detection.boxes import area, cxcywh_to_xyxy, pairwise_iou, xyxy_to_cxcywh
from ssd.anchors import NUM_ANCHORS, make_anchors
from ssd.box_coder import decode, encode, match, to_deltas


@st.composite
def boxes(draw):
    """Draw (N, 4) xyxy boxes of positive size inside the image."""
    rows = draw(st.integers(1, 8))
    lower = torch.from_numpy(draw(arrays("float32", (rows, 2), elements=st.floats(0, 0.875, width=32))))
    size = torch.from_numpy(draw(arrays("float32", (rows, 2), elements=st.floats(0.0078125, 1, width=32))))
    return torch.cat([lower, torch.minimum(lower + size, torch.ones(()))], dim=1)


@given(boxes())
def test_boxes_round_trip_through_centers(xyxy):
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(xyxy)), xyxy, atol=1e-6, rtol=0)


@given(boxes(), boxes())
def test_iou_matches_torchvision(a, b):
    torch.testing.assert_close(pairwise_iou(a, b), torchvision.ops.box_iou(a, b), atol=1e-6, rtol=1e-5)


@given(boxes(), boxes())
def test_iou_is_symmetric_and_between_0_and_1(a, b):
    iou = pairwise_iou(a, b)
    assert ((iou >= 0) & (iou <= 1 + 1e-6)).all()
    torch.testing.assert_close(iou, pairwise_iou(b, a).T)


@given(boxes())
def test_iou_of_a_box_with_itself_is_1(a):
    torch.testing.assert_close(pairwise_iou(a, a).diagonal(), torch.ones(len(a)))


def test_boxes_without_area_have_iou_0():
    empty = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    assert pairwise_iou(empty, empty).item() == 0
    assert pairwise_iou(empty, torch.tensor([[0.0, 0.0, 1.0, 1.0]])).item() == 0


def test_iou_accepts_any_leading_dimensions():
    a, b = torch.rand(3, 2, 4).sort(dim=-1).values, torch.rand(3, 5, 4).sort(dim=-1).values
    batched = pairwise_iou(a, b)
    assert batched.shape == (3, 2, 5)
    for i in range(3):
        torch.testing.assert_close(batched[i], pairwise_iou(a[i], b[i]))


@given(boxes())
def test_area_is_width_times_height(a):
    size = xyxy_to_cxcywh(a)[:, 2:]
    torch.testing.assert_close(area(a), size.prod(dim=1), atol=1e-6, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_decoding_inverts_encoding(seed):
    generator = torch.Generator().manual_seed(seed)
    anchors = make_anchors()
    center = torch.rand(NUM_ANCHORS, 2, generator=generator)
    size = 0.01 + torch.rand(NUM_ANCHORS, 2, generator=generator)
    expected = torch.cat([center, size], dim=1)
    actual = decode(to_deltas(expected, anchors), anchors)
    torch.testing.assert_close(actual, cxcywh_to_xyxy(expected), atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(boxes())
def test_every_gt_box_keeps_an_anchor(xyxy):
    labels = torch.arange(1, len(xyxy) + 1)
    anchors = make_anchors()
    matches = match(xyxy[None], labels[None], anchors)[0]
    best = pairwise_iou(xyxy, anchors.boxes_xyxy).argmax(dim=1)
    for box in range(len(xyxy)):
        # The best anchor of this box is matched to it, or to a later box with the same best anchor.
        owner = int(matches[best[box]])
        assert owner == max(other for other in range(len(xyxy)) if best[other] == best[box])


@settings(max_examples=25, deadline=None)
@given(boxes())
def test_padding_does_not_change_targets(xyxy):
    anchors = make_anchors()
    labels = torch.arange(1, len(xyxy) + 1)
    padded = torch.cat([xyxy, torch.zeros(3, 4)])[None]
    padded_labels = torch.cat([labels, torch.zeros(3, dtype=torch.int64)])[None]
    for actual, expected in zip(
        encode(padded, padded_labels, anchors), encode(xyxy[None], labels[None], anchors), strict=True
    ):
        assert torch.equal(actual, expected)
        assert actual.isfinite().all()


def test_an_image_without_boxes_has_only_background():
    deltas, labels = encode(torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.int64), make_anchors())
    assert not labels.any()
    assert not deltas.any()


def test_overflowing_predictions_give_finite_boxes():
    boxes = decode(torch.full((NUM_ANCHORS, 4), 1e4), make_anchors())
    assert boxes.isfinite().all()


@settings(max_examples=25, deadline=None)
@given(boxes(), boxes())
def test_compiled_encoding_matches_eager_encoding(one, other):
    count = max(len(one), len(other))
    xyxy, labels = torch.zeros(3, count, 4), torch.zeros(3, count, dtype=torch.int64)  # the last has none
    for image, own in enumerate((one, other)):
        xyxy[image, : len(own)], labels[image, : len(own)] = own, torch.arange(1, len(own) + 1)
    eager = encode(xyxy, labels, make_anchors())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        deltas, anchor_labels = encode(xyxy, labels, make_anchors())
    assert torch.equal(anchor_labels, eager[1])
    torch.testing.assert_close(deltas, eager[0], atol=1e-6, rtol=1e-5)
