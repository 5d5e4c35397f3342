"""Tests of region proposals."""

import pytest
import torch
from torchvision import ops

from detection.nn import box_coder
from maskrcnn import rpn
from maskrcnn.anchors import grid_hw, make_anchors
from maskrcnn.config import load

CPU = torch.device("cpu")


def make_config(*flags):
    return load(["--num-classes", "5", *flags], {}).config


@pytest.mark.parametrize("flags", [(), ("--variant", "torchvision")])
@pytest.mark.parametrize("training", [True, False])
def test_proposals_equal_suppression_level_by_level(flags, training):
    height, width = 192, 256
    top_n = ("--rpn-pre-nms-top-n", "300", "--rpn-pre-nms-top-n-eval", "200", "--rpn-post-nms-top-n-eval", "150")
    config = make_config("--batch-size", "2", *top_n, "--rpn-post-nms-top-n-per-image", "180", *flags)
    legacy, generator = config.legacy_boxes, torch.Generator().manual_seed(8)
    anchors = make_anchors(height, width, CPU, legacy=legacy)
    logits, deltas = (torch.randn(2, len(anchors), *last, generator=generator) for last in ((), (4,)))
    deltas[:, ::7] -= 12  # of tiny boxes
    sizes_hw = torch.tensor([[192, 250], [180, 256]])
    proposals = rpn.generate_proposals(
        logits, 0.3 * deltas, anchors, torch.zeros(2, 3, height, width), sizes_hw, config, training=training
    )
    boxes = box_coder.decode(0.3 * deltas, anchors, legacy=legacy)
    boxes = box_coder.clip(boxes, sizes_hw[:, None], legacy=legacy)
    rows = []  # score, image, anchor
    for image in range(2):
        start, image_rows = 0, []
        for count in [3 * h * w for h, w in grid_hw(height, width)]:
            best = start + logits[image, start : start + count].argsort(descending=True)[: 300 if training else 200]
            if not legacy:
                best = best[(boxes[image, best, 2:] - boxes[image, best, :2] >= 1e-3).all(dim=1)]
            exclusive = box_coder.to_exclusive(boxes[image, best], legacy=legacy)
            kept = best[ops.nms(exclusive, logits[image, best], 0.7)].tolist()
            image_rows += [(float(logits[image, anchor]), image, anchor) for anchor in kept]
            start += count
        per_image = 150 if not training else 360 if config.proposals_per_batch else 180
        rows += sorted(image_rows, reverse=True)[:per_image]
    if training and config.proposals_per_batch:
        rows = sorted(rows, reverse=True)[:360]
    for image in range(2):
        expected = [anchor for _, number, anchor in sorted(rows, reverse=True) if number == image]
        actual = proposals.boxes_xyxy[image, proposals.valid[image]]
        torch.testing.assert_close(actual, boxes[image, expected])
        assert len(actual) > 100


def test_proposals_can_be_limited_per_batch():
    anchors = make_anchors(64, 64, CPU, legacy=False)
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, len(anchors), generator=generator) + torch.tensor([[3.0], [-3.0]])
    deltas = torch.zeros(2, len(anchors), 4)
    images, sizes_hw = torch.zeros(2, 3, 64, 64), torch.full((2, 2), 64)

    def count_proposals(*flags, training=True):
        flags = ("--no-legacy-boxes", "--rpn-post-nms-top-n-per-image", "30", "--rpn-post-nms-top-n-eval", "20", *flags)
        config = make_config(*flags)
        proposals = rpn.generate_proposals(logits, deltas, anchors, images, sizes_hw, config, training=training)
        return proposals.valid.sum(dim=1).tolist()

    assert count_proposals("--no-proposals-per-batch") == [30, 30]
    for flags in (("--batch-size", "2"), ("--batch-size", "6", "--grad-accum-steps", "3")):
        first, second = count_proposals(*flags)
        assert first + second == 60
        assert first > 50
    # The last batch of an epoch, with fewer images, keeps as many as a full one.
    assert sum(count_proposals("--batch-size", "3")) == 90
    assert count_proposals("--batch-size", "2", training=False) == [20, 20]


def test_legacy_proposals_have_no_minimum_size():
    anchors = make_anchors(64, 64, CPU, legacy=True)
    deltas = torch.zeros(1, len(anchors), 4)
    deltas[..., 2:] = -20  # of log(width) and log(height)
    logits = torch.randn(1, len(anchors), generator=torch.Generator().manual_seed(9))
    for legacy in (True, False):
        config = make_config("--legacy-boxes" if legacy else "--no-legacy-boxes", "--batch-size", "1")
        proposals = rpn.generate_proposals(
            logits, deltas, anchors, torch.zeros(1, 3, 64, 64), torch.full((1, 2), 64), config, training=True
        )
        assert proposals.valid.any() == legacy


@pytest.mark.parametrize(("flags", "candidates"), [((), 4000), (("--batch-size", "12"), 12000)])
def test_number_of_candidates_follows_the_batch_of_a_rank(flags, candidates):
    assert load(list(flags), {}).config.hyperparameters(8)["num_image_candidates"] == candidates
