"""The baseline of RetinaNet computes the same as retinanet/, so that the ratio of times is that of speed alone."""

from dataclasses import replace

import pytest
import torch

from detection.evaluation.coco_metric import COCO_STATS
from detection.runtime.threads import limit_threads
from perf.harness import BenchContext, bench_size
from perf.retinanet import baseline, evaluation
from perf.retinanet import training as parts
from perf.retinanet.predictions import EARLY, TRAINED

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread_and_few_classes(monkeypatch):
    monkeypatch.setattr(parts, "NUM_CLASSES", 12)
    monkeypatch.setattr(evaluation, "NUM_SCENES", 2)
    with limit_threads(1):
        yield


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    sizes = {"retinanet_batch_size": 2, "retinanet_image_px": 128, "retinanet_eval_images": 5}
    size = replace(bench_size(on_cpu=True, quick=True), photos=2, **sizes)
    folder = tmp_path_factory.mktemp("perf")
    return BenchContext(device=CPU, precision_name="fp32", seed=0, size=size, scratch=folder)


def load_config(context):
    return parts.load_config(context, "--backbone", "resnet18", "--anchor-sizes", "16,32,64,128,256")


def test_steps_have_the_same_losses(context, monkeypatch):
    monkeypatch.setattr(parts, "NUM_CLASSES", 90)  # the photos have COCO's categories
    optimized, torchvision = parts.step_variants(context, load_config(context))
    first = optimized.run()
    assert first.shape == (len(baseline.LOSSES),)
    assert (first > 0).all()
    torch.testing.assert_close(first, torchvision.run(), rtol=1e-4, atol=1e-6)


def test_losses_have_the_same_values_and_gradients(context):
    (optimized, torchvision), moved = parts.loss_variants(context, load_config(context))
    for actual, expected in zip(optimized.run(), torchvision.run(), strict=True):
        assert actual.abs().sum() > 0
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-9)
    assert moved > 2 * 4 * 2 * 3000 * 11


@pytest.mark.parametrize("scores", [TRAINED, EARLY])
def test_detections_are_the_same(context, scores):
    optimized, torchvision = evaluation.decode_variants(context, load_config(context), "scores", scores)
    boxes, labels, image_scores = optimized.run()
    assert len(labels) > 10
    expected_boxes, expected_labels, expected_scores = torchvision.run()
    assert labels.tolist() == expected_labels.tolist()
    torch.testing.assert_close(image_scores, expected_scores)
    torch.testing.assert_close(boxes, expected_boxes, rtol=1e-4, atol=1e-2)


def test_evaluations_have_the_same_metrics(context):
    optimized, torchvision = evaluation.evaluation_variants(context, load_config(context))
    metrics = optimized.run()
    assert metrics == pytest.approx(torchvision.run(), abs=1e-6)
    assert set(metrics) == set(COCO_STATS)
    assert 0.1 < metrics["AP"] < 1
