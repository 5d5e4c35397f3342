"""Tests of the evaluator with a dummy network that returns the annotated objects, or some of them."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api
from torch import nn

from detection.config.settings import read_rank_info
from detection.data import coco
from detection.data.prefetch import HostCopy
from detection.evaluation.coco_metric import COCO_STATS
from detection.runtime.distributed import DistContext, init_process_group
from maskrcnn import masks
from maskrcnn.config import Config
from maskrcnn.data import MaskRCNNEvalSource
from maskrcnn.evaluator import MaskRCNNEvaluator
from maskrcnn.postprocess import Detections
from torchrun import run_ranks

SINGLE_RANK = DistContext(0, 1, torch.device("cpu"))
MODEL = nn.Identity()


def make_config(folder, **settings):
    known = {"dataset": "toy", "num_classes": 4, "eval_batch_size": 3, "num_workers": 0}
    return Config(data_dir=folder, min_image_size=160, max_image_size=200, **known | settings)


class Oracle:
    """Return the annotated objects, amid padding; for even indices without the first `num_missed`."""

    def __init__(self, split, num_missed=0, legacy=True):
        self.split, self.num_missed = split.drop_crowds(), num_missed
        self.last_pixel = torch.tensor([0, 0, legacy, legacy]).float()  # a legacy box ends with its last pixel

    def __call__(self, model, batch):
        count = 12
        boxes, scores = torch.zeros(len(batch.images), count, 4), torch.zeros(len(batch.images), count)
        labels = torch.zeros(len(batch.images), count, dtype=torch.int64)
        bitmaps = torch.zeros(len(batch.images), count, 28, 28)
        for row, index in enumerate(batch.image_indices.tolist()):
            gt_boxes = torch.from_numpy(self.split.boxes(index)) - self.last_pixel
            vertices = masks.mask_vertices(self.split, index)
            scale = (batch.sizes_hw[row] / batch.original_sizes_hw[row]).flip(0).repeat(2)
            for number in range(self.num_missed if index % 2 == 0 else 0, len(gt_boxes)):
                slot = count - 1 - number  # so that padding comes first
                boxes[row, slot] = gt_boxes[number] * scale
                scores[row, slot] = 0.9 - 0.01 * number
                labels[row, slot] = int(self.split.image_labels(index)[number])
                gt_vertices = torch.from_numpy(vertices[number])[None]
                bitmaps[row, slot] = masks.rasterize_polygons(gt_vertices, gt_boxes[None, number])[0]
        return Detections(boxes, scores, labels, bitmaps)


def evaluate(folder, ranks=SINGLE_RANK, num_missed=0, **settings):
    """Evaluate an oracle; return the evaluator and its metrics."""
    config = make_config(folder, **settings)
    data = MaskRCNNEvalSource(config, ranks)
    evaluator = MaskRCNNEvaluator(config, ranks, Oracle(read_val(folder), num_missed, config.legacy_boxes))
    with torch.inference_mode():
        return evaluator, evaluator(MODEL, data)


def read_val(folder):
    return coco.read(*coco.standard_paths(folder, "val"), segmentations=True)


@pytest.fixture(scope="module")
def perfect_evaluation(small_toy):
    return evaluate(small_toy)


def test_perfect_boxes_score_one_and_masks_nearly_one(perfect_evaluation):
    _, metrics = perfect_evaluation
    assert set(metrics) == {*COCO_STATS, *(f"mask_{name}" for name in COCO_STATS)}
    assert metrics["AP"] == pytest.approx(1, abs=1e-3)
    assert metrics["mask_AP50"] == pytest.approx(1)
    assert 0.85 < metrics["mask_AP"] < 1


def test_boxes_without_their_last_pixel_score_one(small_toy):
    _, metrics = evaluate(small_toy, legacy_boxes=False)
    assert metrics["AP"] == pytest.approx(1, abs=1e-3)


def test_pycocotools_confirms_both(perfect_evaluation):
    evaluator, metrics = perfect_evaluation
    assert evaluator.verify_official() == metrics


def test_masks_cover_the_objects_of_the_original_image(perfect_evaluation, small_toy):
    evaluator, _ = perfect_evaluation
    content = json.loads(coco.standard_paths(small_toy, "val")[0].read_text())
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    objects = [a for a in content["annotations"] if not a["iscrowd"]]
    (rows, rles), ids = evaluator.detections, evaluator.val.image_ids
    assert len(rows) == len(rles) == len(objects)
    for row, mask in zip(rows, rles, strict=True):
        assert mask["size"] == sizes[ids[int(row[0])]]
        matches = [
            a for a in objects if a["image_id"] == ids[int(row[0])] and np.allclose(a["bbox"], row[1:5], atol=0.05)
        ]
        assert [a["category_id"] for a in matches] == [row[6]]
        expected = mask_api.merge(mask_api.frPyObjects(matches[0]["segmentation"], *mask["size"]))
        assert mask_api.iou([mask], [expected], [0])[0, 0] > 0.88


def test_labels_map_to_category_ids(perfect_evaluation, small_toy, tmp_path):
    folder = shutil.copytree(small_toy, tmp_path / "data")
    file, _ = coco.standard_paths(folder, "val")
    content = json.loads(file.read_text())
    for row in content["annotations"]:
        row["category_id"] = 30 - 7 * row["category_id"]  # also reverses the order
    for row in content["categories"]:
        row["id"] = 30 - 7 * row["id"]
    file.write_text(json.dumps(content))
    evaluator, metrics = evaluate(folder)
    assert metrics == pytest.approx(perfect_evaluation[1])
    for results in evaluator.coco_results().values():
        assert {row["category_id"] for row in results} == {23, 16, 9}


def test_missed_objects_lower_both_metrics(perfect_evaluation, small_toy):
    _, metrics = evaluate(small_toy, num_missed=2)
    for name in ("AP", "mask_AP"):
        assert metrics[name] < perfect_evaluation[1][name] - 0.1


def test_no_detections_score_zero(small_toy):
    config = make_config(small_toy)
    evaluator = MaskRCNNEvaluator(
        config, SINGLE_RANK, lambda model, batch: Detections(*empty_detections(len(batch.images)))
    )
    assert set(evaluator(MODEL, MaskRCNNEvalSource(config, SINGLE_RANK)).values()) == {0.0}


def empty_detections(size):
    shapes = ((size, 0, 4), (size, 0), (size, 0), (size, 0, 28, 28))
    return [torch.zeros(shape, dtype=torch.int64 if i == 2 else torch.float32) for i, shape in enumerate(shapes)]


def test_batch_size_threads_and_half_precision_do_not_change_metrics(perfect_evaluation, small_toy, monkeypatch):
    monkeypatch.setattr("maskrcnn.evaluator.MAX_PENDING_PER_THREAD", 1)
    assert evaluate(small_toy, eval_batch_size=8, num_workers=2)[1] == perfect_evaluation[1]
    config = make_config(small_toy)
    oracle = Oracle(read_val(small_toy))

    def predict_bf16(model, batch):
        detections = oracle(model, batch)
        return detections._replace(masks=detections.masks.bfloat16())

    evaluator = MaskRCNNEvaluator(config, SINGLE_RANK, predict_bf16)
    assert evaluator(MODEL, MaskRCNNEvalSource(config, SINGLE_RANK)) == perfect_evaluation[1]


def test_next_batch_is_queued_before_detections_are_awaited(small_toy, monkeypatch):
    events = []
    config = make_config(small_toy, eval_batch_size=3)
    oracle = Oracle(read_val(small_toy))

    class RecordedCopy(HostCopy):
        def wait(self):
            events.append("wait")
            return super().wait()

    def predict(model, batch):
        events.append("predict")
        return oracle(model, batch)

    monkeypatch.setattr("maskrcnn.evaluator.HostCopy", RecordedCopy)
    evaluator = MaskRCNNEvaluator(config, SINGLE_RANK, predict)
    assert evaluator(MODEL, MaskRCNNEvalSource(config, SINGLE_RANK))["AP"] == pytest.approx(1, abs=1e-3)
    assert events == ["predict", "predict", "wait", "predict", "wait", "wait"]


def test_results_are_in_coco_format(perfect_evaluation):
    boxes, segmentations = json.loads(json.dumps(perfect_evaluation[0].coco_results())).values()
    assert [set(row) for row in (boxes[0], segmentations[0])] == [
        {"image_id", "category_id", "bbox", "score"},
        {"image_id", "category_id", "segmentation", "score"},
    ]


def test_ranks_share_metrics_and_the_first_holds_all_detections(perfect_evaluation, small_toy, tmp_path):
    process = run_ranks(2, __file__, small_toy, tmp_path)
    assert process.returncode == 0, process.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["metrics"] == second["metrics"] == perfect_evaluation[1]
    assert (first["detections"], second["detections"]) == (len(perfect_evaluation[0].detections.rows), 0)


def main(data, results):
    with init_process_group(read_rank_info(), torch.device("cpu"), timeout_s=60) as ranks:
        evaluator, metrics = evaluate(data, ranks)
        content = {"metrics": metrics, "detections": len(evaluator.detections.rows)}
        (results / f"{ranks.rank}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
