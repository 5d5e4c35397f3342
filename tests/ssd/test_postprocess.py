import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from detection.boxes import pairwise_iou
from ssd import postprocess as module
from ssd.anchors import make_anchors
from ssd.box_coder import decode
from ssd.postprocess import detect, suppress
from tiny_ssd import predictions


def one_by_one(boxes, scores, threshold=0.05, nms_threshold=0.5, most=200):
    """Detections of one image as a set of (label, anchor), class after class and box after box."""
    kept = []
    for label in range(1, scores.shape[1]):
        candidates = [
            a
            for a in scores[:, label].argsort(descending=True, stable=True)[:most].tolist()
            if scores[a, label] > threshold
        ]
        while candidates:
            best, *rest = candidates
            kept.append((float(scores[best, label]), label, best))
            overlap = pairwise_iou(boxes[best : best + 1], boxes[rest])[0] if rest else []
            candidates = [a for a, iou in zip(rest, overlap, strict=True) if iou < nms_threshold]
    return sorted(kept, reverse=True)[:most]


def test_detections_are_those_of_the_sequential_rule():
    anchors = make_anchors()
    for seed, peak in ((0, 6.0), (1, 4.0), (2, 3.0)):
        deltas, logits = predictions(seed, peak=peak)
        found = detect(deltas, logits, anchors)
        for image in range(2):
            wanted = one_by_one(decode(deltas[image], anchors), logits[image].softmax(-1))
            mine = found.images == image
            assert mine.sum() == len(wanted) > 0
            assert found.labels[mine].tolist() == [label for _, label, _ in wanted]
            boxes = decode(deltas[image], anchors)[[anchor for _, _, anchor in wanted]]
            torch.testing.assert_close(found.boxes_xyxy[mine], boxes)


def test_groups_computed_in_parts_give_the_same(monkeypatch):
    deltas, logits = predictions(5)
    whole = detect(deltas, logits, make_anchors())
    monkeypatch.setattr(module, "MAX_PAIRS", 1)
    for part, same in zip(detect(deltas, logits, make_anchors()), whole, strict=True):
        assert torch.equal(part, same)


def test_nothing_above_the_threshold_gives_empty_detections():
    deltas, logits = predictions(0)
    logits[..., 0] += 100
    found = detect(deltas, logits, make_anchors())
    assert found.boxes_xyxy.shape == (0, 4)
    assert len(found.scores) == 0


def test_an_overlap_of_exactly_the_limit_is_dropped():
    boxes = torch.tensor([[0.0, 0, 2, 1], [0, 0, 1, 1], [5, 5, 6, 6]])  # the first two overlap by 1/2
    assert suppress(boxes, torch.zeros(3, dtype=torch.int64), 0.5).tolist() == [True, False, True]
    assert suppress(boxes, torch.tensor([0, 1, 1]), 0.5).tolist() == [True, True, True]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 4))
def test_a_box_stays_exactly_if_no_better_one_that_stays_overlaps_it(seed, count, groups):
    generator = torch.Generator().manual_seed(seed)
    lower = torch.rand(count, 2, generator=generator)
    boxes = torch.cat([lower, lower + 0.05 + 0.5 * torch.rand(count, 2, generator=generator)], dim=1)
    group = torch.randint(0, groups, (count,), generator=generator).sort().values
    keep = suppress(boxes, group, 0.5)
    iou = pairwise_iou(boxes, boxes)
    for j in range(count):
        beaten = any(keep[i] and group[i] == group[j] and iou[i, j] >= 0.5 for i in range(j))
        assert bool(keep[j]) != beaten
