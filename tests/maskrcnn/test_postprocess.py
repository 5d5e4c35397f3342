"""Tests of the selection of detections."""

import pytest
import torch
from torchvision import ops

from detection.nn import box_coder
from maskrcnn.config import load
from maskrcnn.postprocess import select_detections
from maskrcnn.rpn import Proposals
from tiny_maskrcnn import SIZES_HW, make_outputs


@pytest.mark.parametrize("legacy", [True, False])
def test_detections_equal_suppression_class_by_class(legacy):
    flags = ("--num-classes", "6", "--max-detections", "50", "--legacy-boxes" if legacy else "--no-legacy-boxes")
    config = load(list(flags), {}).config
    logits, deltas, proposals = make_outputs(torch.Generator().manual_seed(0))
    deltas[:, ::5, :, 2:] -= 100  # nothing wider than a thousandth of a pixel
    actual = select_detections(logits, deltas, proposals, SIZES_HW, config)
    for image in range(2):
        rows = []  # of score, label, proposal, box
        scores = logits[image].softmax(dim=1)
        for label in range(1, 6):
            boxes = box_coder.decode(
                deltas[image, :, label], proposals.boxes_xyxy[image], box_coder.BOX_HEAD_WEIGHTS, legacy=legacy
            )
            boxes = box_coder.clip(boxes, SIZES_HW[image], legacy=legacy)
            allowed = (scores[:, label] > 0.05) & proposals.valid[image]
            allowed &= legacy | (boxes[:, 2:] - boxes[:, :2] >= 0.01).all(dim=1)
            (index,) = allowed.nonzero(as_tuple=True)
            exclusive = box_coder.to_exclusive(boxes[index], legacy=legacy)
            kept = index[ops.nms(exclusive, scores[index, label], 0.5)].tolist()
            rows += [(-float(scores[p, label]), label, p, boxes[p].tolist()) for p in kept]
        expected = sorted(rows)[:50]
        boxes_xyxy, top_scores, labels = (part[image] for part in actual)
        count = len(expected)
        assert 20 < count <= 50
        assert labels.tolist() == [row[1] for row in expected] + [0] * (len(labels) - count)
        assert (-top_scores[:count]).tolist() == [row[0] for row in expected]
        torch.testing.assert_close(boxes_xyxy[:count], torch.tensor([row[3] for row in expected]))
        assert not boxes_xyxy[count:].any()
        assert not top_scores[count:].any()


def test_no_candidates_give_no_detections():
    logits, deltas, proposals = make_outputs(torch.Generator().manual_seed(1))
    logits[..., 0] += 100
    boxes_xyxy, scores, labels = select_detections(
        logits, deltas, proposals, SIZES_HW, load(["--num-classes", "6"], {}).config
    )
    assert boxes_xyxy.shape[:2] == scores.shape == labels.shape
    assert not labels.any()


def test_ties_at_the_last_detection_keep_the_number_of_detections():
    """The reference keeps all detections with the score of the last, here the first of them."""
    x = torch.arange(60) * 2.0
    boxes = torch.stack([x, x, x + 1, x + 1], dim=1).expand(1, -1, -1)
    proposals = Proposals(boxes, torch.zeros(1, 60), torch.ones(1, 60, dtype=torch.bool))
    config = load(["--num-classes", "3", "--max-detections", "50"], {}).config
    sizes_hw = torch.tensor([[200, 200]])
    _, scores, labels = select_detections(torch.zeros(1, 60, 3), torch.zeros(1, 60, 3, 4), proposals, sizes_hw, config)
    assert scores.unique().numel() == 1
    assert labels.tolist() == [[1] * 50]
