import pytest
import torch
from torchvision.ops import clip_boxes_to_image, nms

from detection.nn import box_coder
from retinanet.anchors import make_anchors
from retinanet.model import HeadOutputs
from retinanet.postprocess import detect, top_candidates

CPU = torch.device("cpu")
SIZE_PX = 128


def detect_naively(logits, deltas, anchors, *, top_n, max_detections):
    """Return boxes, labels and scores of one image by loops over levels and classes."""
    rows = []
    for level_logits, level_deltas, level_anchors in zip(logits, deltas, anchors, strict=True):
        scores = level_logits.sigmoid()
        candidates = sorted(((float(s), i) for i, s in enumerate(scores.flatten()) if s > 0.05), key=lambda c: -c[0])
        for score, index in candidates[:top_n]:
            anchor, label = divmod(index, scores.shape[1])
            box = box_coder.decode(level_deltas[anchor], level_anchors[anchor], legacy=False)
            rows.append((score, label + 1, clip_boxes_to_image(box[None], (SIZE_PX, SIZE_PX))[0]))
    kept = []
    for label in {row[1] for row in rows}:
        own = [row for row in rows if row[1] == label]
        keep = nms(torch.stack([row[2] for row in own]), torch.tensor([row[0] for row in own]), 0.5)
        kept += [own[i] for i in keep]
    return sorted(kept, key=lambda row: -row[0])[:max_detections]


@pytest.mark.parametrize("bias", [-4.0, -2.0, -30.0])  # few detections, many, none
def test_detections_equal_those_of_a_naive_implementation(bias):
    generator = torch.Generator().manual_seed(0)
    anchors = make_anchors(SIZE_PX, SIZE_PX, CPU)
    logits = [bias + torch.randn(2, len(level), 3, generator=generator) for level in anchors]
    deltas = [0.5 * torch.randn(2, len(level), 4, generator=generator) for level in anchors]
    limits = {"pre_nms_top_n": 50, "max_detections": 40}
    actual = detect(HeadOutputs(logits, deltas), anchors, (SIZE_PX, SIZE_PX), **limits)
    for image in range(2):
        rows = actual.batch_index == image
        expected = detect_naively(
            [level[image] for level in logits], [level[image] for level in deltas], anchors, top_n=50, max_detections=40
        )
        assert actual.labels[rows].tolist() == [label for _, label, _ in expected]
        assert actual.scores[rows].tolist() == pytest.approx([score for score, _, _ in expected])
        if expected:
            torch.testing.assert_close(actual.boxes_xyxy[rows], torch.stack([box for *_, box in expected]))
    assert (len(actual.labels) == 0) == (bias == -30)


@pytest.mark.parametrize("count", [4, 5, 6, 40])
def test_as_many_anchors_as_are_kept_may_share_the_best_score(count):
    logits = torch.full((2, 40, 3), -9.0)
    logits[0, :count, 1] = 2.0
    logits[1, ::8] = torch.tensor([1.0, -9.0, 3.0])  # five anchors with two classes each
    candidates = top_candidates(logits, 0.05, 5, 100)
    assert candidates.image.bincount().tolist() == [min(count, 5), 5]
    assert candidates.label.tolist() == [1] * min(count, 5) + [2] * 5
    assert candidates.anchor.tolist() == [*range(100, 100 + min(count, 5)), *range(100, 140, 8)]


def test_an_anchor_may_have_several_classes():
    anchors = make_anchors(SIZE_PX, SIZE_PX, CPU)
    logits = [torch.full((1, len(level), 3), -9.0) for level in anchors]
    logits[0][0, 500] = torch.tensor([2.0, -9.0, 1.0])
    outputs = HeadOutputs(logits, [torch.zeros(1, len(level), 4) for level in anchors])
    assert detect(outputs, anchors, (SIZE_PX, SIZE_PX)).labels.tolist() == [1, 3]


def test_boxes_are_clipped_to_width_and_height():
    height, width = 128, 160
    anchors = make_anchors(height, width, CPU)
    logits = [torch.full((1, len(level), 1), -9.0) for level in anchors]
    logits[-1][:] = 2.0
    outputs = HeadOutputs(logits, [torch.full((1, len(level), 4), 3.0) for level in anchors])
    boxes = detect(outputs, anchors, (height, width)).boxes_xyxy
    assert boxes.amax(dim=0)[2:].tolist() == [width, height]
    assert boxes.min() == 0
