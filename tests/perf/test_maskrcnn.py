"""The baseline of Mask R-CNN computes the same as maskrcnn/, so that the ratio of times is that of speed alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from detection.evaluation.coco_metric import COCO_STATS
from detection.runtime.threads import limit_threads
from maskrcnn.roi_heads import BOX_POOL_SIZE
from perf.harness import BenchContext, bench_size
from perf.maskrcnn import baseline, evaluation, mask_targets
from perf.maskrcnn import training as parts

CPU = torch.device("cpu")
ALL = "100000"  # samples of a loss, so many that none is random


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    torch.manual_seed(0)
    with limit_threads(1):
        yield


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """Two images of 128 × 192 pixels with padding: multiples of 64, for which both have the same anchors."""
    sizes = {"maskrcnn_batch_size": 2, "maskrcnn_image_px": (128, 192), "maskrcnn_eval_images": 6}
    size = replace(bench_size(on_cpu=True, quick=True), photos=4, **sizes)
    folder = tmp_path_factory.mktemp("perf")
    return BenchContext(device=CPU, precision_name="fp32", seed=0, size=size, scratch=folder)


def test_steps_have_the_same_losses_at_every_repetition(context):
    flags = (
        "--variant",
        "torchvision",
        "--backbone",
        "resnet18",
        "--precision",
        "fp32",
        "--rpn-post-nms-top-n-per-image",
        "200",
    )
    config = parts.load_config(context, *flags, "--rpn-batch-size-per-image", ALL, "--box-batch-size-per-image", ALL)
    optimized, torchvision = parts.step_variants(context, config)
    first = optimized.run()
    assert first.shape == (len(baseline.LOSSES),)
    assert torch.isfinite(first).all()
    assert (first > 0).all()
    torch.testing.assert_close(first, torchvision.run(), rtol=2e-4, atol=1e-5)
    for variant in (optimized, torchvision):
        torch.testing.assert_close(variant.run(), first, rtol=0.02, atol=1e-3)


def test_backbones_have_the_same_features(context):
    config = parts.load_config(context, "--variant", "torchvision", "--backbone", "resnet18")
    optimized, *baselines = parts.backbone_variants(context, config)
    features = optimized.run()
    assert [level.shape[1] for level in features] == [256] * 5
    for variant in baselines:
        for actual, expected in zip(features, variant.run(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_roi_align_has_the_same_regions_and_gradient(context):
    gather, torchvision, kernel = parts.roi_align_variants(context, BOX_POOL_SIZE, 24)
    assert ("gather" in gather.name, "torchvision" in kernel.name) == (True, True)
    for variant in (gather, kernel):
        for actual, expected in zip(variant.run(), torchvision.run(), strict=True):
            assert actual.abs().sum() > 0
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_proposals_are_the_same(context):
    optimized, torchvision = parts.proposal_variants(context)
    actual = optimized.run()
    assert len(actual) > 50
    torch.testing.assert_close(actual, torchvision.run(), rtol=1e-4, atol=1e-2)


def test_mask_loss_of_one_class_equals_that_among_all_classes(context, monkeypatch):
    monkeypatch.setattr(parts, "MASK_REGIONS", 3)
    optimized, *baselines = parts.mask_head_variants(context)
    loss, gradient = optimized.run()
    for variant in baselines:
        baseline_loss, baseline_gradient = variant.run()
        torch.testing.assert_close(loss, baseline_loss, rtol=1e-4, atol=1e-7)
        # Rounding flips a ReLU here and there, so compare the gradient as a whole.
        assert (gradient - baseline_gradient).norm() < 0.01 * gradient.norm()


def test_mask_targets_have_the_bits_of_the_reference(context, monkeypatch):
    monkeypatch.setattr(mask_targets, "REGIONS_PER_IMAGE", 20)
    optimized, reference = mask_targets.mask_target_variants(context)
    actual = optimized.run()
    assert actual.shape == (2 * 20, 28, 28)
    assert 0.2 < actual.mean() < 0.8
    assert torch.equal(actual, reference.run())


def test_pasted_masks_have_the_same_pixels(context, monkeypatch):
    monkeypatch.setattr(evaluation, "DETECTIONS_PER_IMAGE", 15)
    scenes = evaluation.make_scenes(context.gt_split(3, segmentations=True), seed=1)
    optimized, torchvision = evaluation.paste_variants(scenes, CPU)
    actual = optimized.run()
    assert actual == torchvision.run()
    assert [len(image_masks) for image_masks in actual] == [15] * 3


def test_evaluations_have_the_same_metrics(context, monkeypatch):
    monkeypatch.setattr(evaluation, "DETECTIONS_PER_IMAGE", 20)
    optimized, torchvision = evaluation.evaluation_variants(context)
    metrics = optimized.run()
    assert metrics == pytest.approx(torchvision.run(), abs=1e-9)
    assert set(metrics) == {*COCO_STATS, *(f"mask_{name}" for name in COCO_STATS)}
    assert 0.01 < metrics["AP"] < 1
    assert 0.01 < metrics["mask_AP50"] < 1


def test_synthetic_detections_are_inside_their_images(context):
    for scene in evaluation.make_scenes(context.gt_split(3, segmentations=True), seed=2):
        height, width = scene.size_hw
        assert (scene.boxes_xyxy >= 0).all()
        assert (scene.boxes_xyxy <= [width, height, width, height]).all()
        assert (scene.boxes_xyxy[:, 2:] - scene.boxes_xyxy[:, :2] > 0.99).all()
        assert scene.masks.shape == (evaluation.DETECTIONS_PER_IMAGE, 28, 28)
        filled = (scene.masks > 0.5).mean(axis=(1, 2))
        assert 0.1 < filled.min() < filled.max() < 0.9
        assert len(np.unique(filled)) > 20
