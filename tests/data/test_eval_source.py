"""Evaluation images with and without ground-truth boxes, in both workloads."""

import json
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from detection.data import coco
from detection.engine import evaluation
from detection.engine.workload import TrainResult
from detection.nn.detections import Detections
from detection.runtime.distributed import DistContext
from maskrcnn import config as maskrcnn_config
from maskrcnn.data import MaskRCNNEvalSource
from maskrcnn.evaluator import MaskRCNNEvaluator
from maskrcnn.postprocess import Detections as MaskDetections
from ssd import config as ssd_config
from ssd.data import SSDEvalSource
from ssd.evaluator import SSDEvaluator

CPU = torch.device("cpu")
WORKLOADS = {"ssd": (ssd_config.Config, SSDEvalSource), "maskrcnn": (maskrcnn_config.Config, MaskRCNNEvalSource)}
EMPTY = {2, 5, 7}
"""Positions of the evaluation images without boxes."""


@pytest.fixture(scope="module")
def val_with_empty_images(small_toy, tmp_path_factory):
    """Annotations of `small_toy` in which three of the eight evaluation images have no box."""
    file = tmp_path_factory.mktemp("annotations") / "val.json"
    content = json.loads(coco.standard_paths(small_toy, "val")[0].read_text())
    ids = {row["id"] for position, row in enumerate(content["images"]) if position in EMPTY}
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] not in ids]
    file.write_text(json.dumps(content))
    return file


@pytest.fixture
def make_config(small_toy, val_with_empty_images):
    def make(workload, **settings):
        paths = {
            f"train_{name}": str(path)
            for name, path in zip(("annotations", "images"), coco.standard_paths(small_toy, "train"), strict=True)
        }
        val = {"val_annotations": str(val_with_empty_images), "val_images": str(small_toy / "val2017")}
        if workload == "maskrcnn":
            settings |= {"min_image_size": 64, "max_image_size": 128}
        return WORKLOADS[workload][0](
            **paths, **val, dataset="mine", num_classes=4, num_workers=0, eval_batch_size=2, **settings
        )

    return make


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("choice", ["with-boxes", "all"])
def test_each_image_is_evaluated_or_left_out_on_one_rank(make_config, workload, choice):
    config, make_source = make_config(workload, eval_images=choice), WORKLOADS[workload][1]
    evaluated, left_out = Counter(), Counter()
    for rank in range(3):
        source = make_source(config, DistContext(rank, 3, CPU))
        assert source.eval_samples == (5 if choice == "with-boxes" else 8)
        evaluated.update(int(i) for batch in source.eval_batches() for i in batch.image_indices)
        left_out.update(int(i) for batch in source.left_out_batches() for i in batch.image_indices)
    empty = set(EMPTY)
    assert set(left_out) == (empty if choice == "with-boxes" else set())
    assert evaluated + left_out == Counter(range(len(source.val)))


class RandomDetector:
    """Stands in for a network: the same random detections for an image in every batch. Counts the images."""

    def __init__(self, config):
        self.config, self.counts = config, Counter()

    def __call__(self, model, batch):
        indices = batch.image_indices.tolist()
        self.counts.update(indices)
        parts = [self.detect(index) for index in indices]
        boxes, scores, labels = (torch.stack(part) for part in zip(*parts, strict=True))
        if self.config.benchmark == "ssd":
            index = torch.arange(len(indices)).repeat_interleave(boxes.shape[1])
            return Detections(index, boxes.flatten(0, 1), labels.flatten(), scores.flatten())
        boxes = boxes * batch.sizes_hw.flip(1).repeat(1, 2)[:, None]
        return MaskDetections(boxes, scores, labels, torch.ones(*labels.shape, 28, 28))

    def detect(self, index):
        rng = torch.Generator().manual_seed(index)
        left_top = torch.rand(60, 2, generator=rng) * 0.7
        boxes = torch.cat([left_top, left_top + 0.1 + 0.2 * torch.rand(60, 2, generator=rng)], dim=1)
        return boxes, torch.rand(60, generator=rng), torch.randint(1, 4, (60,), generator=rng)


def evaluate_both(config):
    """Return the metrics of an evaluation, those of the other choice, the evaluator and its detector."""
    ranks, detector = DistContext(0, 1, CPU), RandomDetector(config)
    if config.benchmark == "ssd":
        evaluator, data = SSDEvaluator(config, ranks), SSDEvalSource(config, ranks)
        evaluator.predict = detector
    else:
        evaluator, data = MaskRCNNEvaluator(config, ranks, detector), MaskRCNNEvalSource(config, ranks)
    metrics = evaluator(None, data)
    assert len(detector.counts) == data.eval_samples
    return metrics, evaluator.evaluate_other(None, data), evaluator, detector


@pytest.mark.parametrize("workload", WORKLOADS)
def test_both_choices_report_the_same_two_numbers_and_detect_once(make_config, workload):
    with_boxes, other_all, evaluator, detector = evaluate_both(make_config(workload, eval_images="with-boxes"))
    everywhere, other_with_boxes, _, all_detector = evaluate_both(make_config(workload, eval_images="all"))
    assert other_all._replace(metrics=None) == ("all", 8, None)
    assert other_with_boxes._replace(metrics=None) == ("with-boxes", 5, None)
    assert other_all.metrics == everywhere
    assert other_with_boxes.metrics == with_boxes
    assert with_boxes["AP"] > everywhere["AP"] > 0, "false positives on empty images count"
    assert with_boxes["AR100"] == everywhere["AR100"]
    assert set(detector.counts.values()) == set(all_detector.counts.values()) == {1}
    assert len(detector.counts) == 8
    assert evaluator.verify_official() == pytest.approx(with_boxes), "the detections of the run stay its own"


def test_no_second_number_if_every_image_has_a_box(small_toy):
    config = ssd_config.Config(data_dir=small_toy, dataset="toy", num_classes=4, num_workers=0)
    assert evaluate_both(config)[1] is None


def test_second_number_comes_after_the_timer_and_its_failure_keeps_the_summary(monkeypatch):
    calls = []
    logger = SimpleNamespace(
        stop_timer=lambda: calls.append("stop"),
        finish=lambda **fields: calls.append(fields),
        print=lambda text: calls.append(text),
    )
    monkeypatch.setattr(evaluation, "eval_mode", lambda *_: nullcontext("model"))

    def fail(model, data):
        calls.append((model, data))
        raise OSError("broken image")

    run, workload = SimpleNamespace(logger=logger), SimpleNamespace(evaluate_other=fail)
    with pytest.raises(OSError, match="broken image"):
        evaluation.finish(TrainResult(True, 3, {}), None, "data", workload, run)
    assert calls == ["stop", ("model", "data"), {"converged": True, "other_eval_images": None}]


@pytest.mark.parametrize(
    ("workload", "flags", "expected"),
    [
        ("ssd", [], "with-boxes"),
        ("ssd", ["--division", "open"], "all"),
        ("ssd", ["--dataset", "toy"], "all"),
        ("ssd", ["--eval-images", "all"], "all"),
        ("ssd", ["--division", "open", "--eval-images", "with-boxes"], "with-boxes"),
        ("maskrcnn", [], "all"),
        ("maskrcnn", ["--eval-images", "with-boxes"], "with-boxes"),
    ],
)
def test_default_is_the_references_for_coco_in_the_closed_division(workload, flags, expected):
    load = ssd_config.load if workload == "ssd" else maskrcnn_config.load
    assert load(flags, {}).config.eval_images == expected


def test_crowds_count_as_boxes(small_toy):
    split = coco.read(*coco.standard_paths(small_toy, "val"))
    object.__setattr__(split, "is_crowd", np.ones_like(split.is_crowd))
    assert split.has_boxes.all()
