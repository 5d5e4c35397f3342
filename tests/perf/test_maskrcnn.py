"""torchvision's way computes what Mask R-CNN's bench measures of ours: else its speed would say nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from detection.evaluation.coco_metric import COCO_STATS
from maskrcnn.roi_heads import BOX_POOL_SIZE
from perf.harness import BenchContext, quick_size
from perf.maskrcnn import baseline, evaluation
from perf.maskrcnn import training as parts
from perf.timing import limit_threads

CPU = torch.device("cpu")
ALL = "100000"  # so many samples that nothing is left to chance


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with limit_threads(1):
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """For two images of 128 × 192 pixels with their padding: multiples of 64, at which both have the same anchors."""
    sizes = {"maskrcnn_batch_size": 2, "maskrcnn_image_px": (128, 192), "maskrcnn_eval_images": 6}
    scale = replace(quick_size(on_cpu=True), photos=4, **sizes)
    folder = tmp_path_factory.mktemp("bench")
    return BenchContext(device=CPU, precision_name="fp32", seed=0, size=scale, scratch=folder)


def test_both_steps_have_the_same_losses_however_many_are_timed(bench):
    flags = ("--variant", "torchvision", "--backbone", "resnet18", "--precision", "fp32", "--rpn-post-nms-top-n", "200")
    config = parts.configured(bench, *flags, "--rpn-batch-size-per-image", ALL, "--box-batch-size-per-image", ALL)
    ours, (theirs,) = parts.step_variants(bench, config)
    first = ours.run()
    assert first.shape == (len(baseline.LOSSES),)
    assert torch.isfinite(first).all()
    assert (first > 0).all()
    torch.testing.assert_close(first, theirs.run(), rtol=2e-4, atol=1e-5)
    for side in (ours, theirs):
        torch.testing.assert_close(side.run(), first, rtol=0.02, atol=1e-3)


def test_both_trunks_have_the_same_features(bench):
    ours, theirs = parts.backbone_variants(
        bench, parts.configured(bench, "--variant", "torchvision", "--backbone", "resnet18")
    )
    features = ours.run()
    assert [level.shape[1] for level in features] == [256] * 5
    for side in theirs:
        for got, wanted in zip(features, side.run(), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_both_cut_the_same_regions_and_have_the_same_gradient(bench):
    ours, (theirs,) = parts.align_variants(bench, BOX_POOL_SIZE, 24)
    for got, wanted in zip(ours.run(), theirs.run(), strict=True):
        assert got.abs().sum() > 0
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_both_make_the_same_proposals(bench):
    ours, (theirs,) = parts.proposal_variants(bench)
    got, wanted = ours.run(), theirs.run()
    assert len(got) > 50
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-2)


def test_one_class_has_the_loss_that_it_has_among_all(bench, monkeypatch):
    monkeypatch.setattr(parts, "MASK_REGIONS", 3)
    ours, theirs = parts.mask_head_variants(bench)
    got = ours.run()
    for side in theirs:
        for mine, wanted in zip(got, side.run(), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-7)


def test_both_paste_the_same_pixels(bench, monkeypatch):
    monkeypatch.setattr(evaluation, "DETECTIONS_PER_IMAGE", 15)
    scenes = evaluation.make_scenes(evaluation.gt_with_masks(bench, 3), seed=1)
    ours, (theirs,) = evaluation.paste_variants(scenes, CPU)
    got = ours.run()
    assert got == theirs.run()
    assert [len(of_image) for of_image in got] == [15] * 3


def test_both_evaluations_have_the_same_figures(bench, monkeypatch):
    monkeypatch.setattr(evaluation, "DETECTIONS_PER_IMAGE", 20)
    ours, (theirs,) = evaluation.evaluation_variants(bench)
    got = ours.run()
    assert got == pytest.approx(theirs.run(), abs=1e-9)
    assert set(got) == {*COCO_STATS, *(f"mask_{name}" for name in COCO_STATS)}
    assert 0.01 < got["AP"] < 1
    assert 0.01 < got["mask_AP50"] < 1


def test_made_up_detections_lie_on_their_images(bench):
    for scene in evaluation.make_scenes(evaluation.gt_with_masks(bench, 3), seed=2):
        height, width = scene.size_hw
        assert (scene.boxes_xyxy >= 0).all()
        assert (scene.boxes_xyxy <= [width, height, width, height]).all()
        assert (scene.boxes_xyxy[:, 2:] - scene.boxes_xyxy[:, :2] > 0.99).all()
        assert scene.masks.shape == (evaluation.DETECTIONS_PER_IMAGE, 28, 28)
        shares = (scene.masks > 0.5).mean(axis=(1, 2))
        assert 0.1 < shares.min() < shares.max() < 0.9
        assert len(np.unique(shares)) > 20
