import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from detection.boxes import pairwise_iou
from ssd import postprocess
from ssd.anchors import make_anchors
from ssd.box_coder import decode
from ssd.postprocess import detect, grouped_nms
from tiny_ssd import predictions


def detect_sequentially(boxes, scores, threshold=0.05, nms_threshold=0.5, max_detections=200):
    """Detect with sequential greedy NMS on one image: a list of (score, label, anchor), best first."""
    kept = []
    for label in range(1, scores.shape[1]):
        candidates = [
            a
            for a in scores[:, label].argsort(descending=True, stable=True)[:max_detections].tolist()
            if scores[a, label] > threshold
        ]
        while candidates:
            best, *rest = candidates
            kept.append((float(scores[best, label]), label, best))
            overlap = pairwise_iou(boxes[best : best + 1], boxes[rest])[0] if rest else []
            candidates = [a for a, iou in zip(rest, overlap, strict=True) if iou < nms_threshold]
    return sorted(kept, reverse=True)[:max_detections]


def test_detections_match_sequential_nms():
    anchors = make_anchors()
    for seed, peak in ((0, 6.0), (1, 4.0), (2, 3.0)):
        deltas, logits = predictions(seed, peak=peak)
        detections = detect(deltas, logits, anchors)
        for image in range(2):
            expected = detect_sequentially(decode(deltas[image], anchors), logits[image].softmax(-1))
            in_image = detections.batch_index == image
            assert in_image.sum() == len(expected) > 0
            assert detections.labels[in_image].tolist() == [label for _, label, _ in expected]
            boxes = decode(deltas[image], anchors)[[anchor for _, _, anchor in expected]]
            torch.testing.assert_close(detections.boxes_xyxy[in_image], boxes)


def test_splitting_groups_does_not_change_the_detections(monkeypatch):
    deltas, logits = predictions(5)
    whole = detect(deltas, logits, make_anchors())
    monkeypatch.setattr(postprocess, "MAX_PAIRS", 1)
    for part, same in zip(detect(deltas, logits, make_anchors()), whole, strict=True):
        assert torch.equal(part, same)


def test_scores_below_the_threshold_give_no_detections():
    deltas, logits = predictions(0)
    logits[..., 0] += 100
    detections = detect(deltas, logits, make_anchors())
    assert detections.boxes_xyxy.shape == (0, 4)
    assert len(detections.scores) == 0


def test_nms_drops_a_box_with_iou_equal_to_the_threshold():
    boxes = torch.tensor([[0.0, 0, 2, 1], [0, 0, 1, 1], [5, 5, 6, 6]])  # the IoU of the first two is 1/2
    assert grouped_nms(boxes, torch.zeros(3, dtype=torch.int64), 0.5).tolist() == [True, False, True]
    assert grouped_nms(boxes, torch.tensor([0, 1, 1]), 0.5).tolist() == [True, True, True]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 4))
def test_nms_keeps_a_box_exactly_if_no_better_kept_box_overlaps_it(seed, count, groups):
    generator = torch.Generator().manual_seed(seed)
    lower = torch.rand(count, 2, generator=generator)
    boxes = torch.cat([lower, lower + 0.05 + 0.5 * torch.rand(count, 2, generator=generator)], dim=1)
    group = torch.randint(0, groups, (count,), generator=generator).sort().values
    keep = grouped_nms(boxes, group, 0.5)
    iou = pairwise_iou(boxes, boxes)
    for j in range(count):
        is_suppressed = any(keep[i] and group[i] == group[j] and iou[i, j] >= 0.5 for i in range(j))
        assert bool(keep[j]) != is_suppressed
