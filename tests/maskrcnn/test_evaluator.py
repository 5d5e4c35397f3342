"""Evaluation of a network that is made up: it sees what is in the annotations, or less."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api
from torch import nn

from detection.config.settings import read_topology
from detection.data import coco
from detection.evaluation.coco_metric import FIGURES, to_mask_results, to_results
from detection.runtime.distributed import Ranks, connect
from maskrcnn import masks
from maskrcnn.config import Config
from maskrcnn.data import MaskRCNNEvalData
from maskrcnn.evaluator import Evaluation
from maskrcnn.postprocess import Detections
from paths import ROOT

ALONE = Ranks(0, 1, torch.device("cpu"))
MODEL = nn.Identity()


def config_of(folder, **settings):
    known = {"dataset": "toy", "num_classes": 4, "eval_batch_size": 3, "num_workers": 0}
    return Config(data_dir=folder, min_image_size=160, max_image_size=200, **known | settings)


class Oracle:
    """Sees the objects of the annotations, of even image ids without the first `blind`, and padding between them."""

    def __init__(self, split, blind=0, legacy=True):
        self.split, self.blind = split.without_crowds(), blind
        self.shorter = torch.tensor([0, 0, legacy, legacy]).float()  # a legacy box ends with its last pixel
        self.index = {image_id: i for i, image_id in enumerate(self.split.image_ids.tolist())}

    def __call__(self, model, batch):
        count = 12
        boxes, scores = torch.zeros(len(batch.images), count, 4), torch.zeros(len(batch.images), count)
        labels = torch.zeros(len(batch.images), count, dtype=torch.int64)
        seen = torch.zeros(len(batch.images), count, 28, 28)
        for row, image_id in enumerate(batch.image_ids.tolist()):
            index = self.index[image_id]
            own = torch.from_numpy(self.split.boxes(index)) - self.shorter
            edges = masks.edges_of(self.split, index)
            scale = (batch.sizes_hw[row] / batch.original_sizes_hw[row]).flip(0).repeat(2)
            for number in range(self.blind if image_id % 2 == 0 else 0, len(own)):
                place = count - 1 - number  # so that padding comes first
                boxes[row, place] = own[number] * scale
                scores[row, place] = 0.9 - 0.01 * number
                labels[row, place] = int(self.split.image_labels(index)[number])
                seen[row, place] = masks.rasterise(torch.from_numpy(edges[number])[None], own[None, number])[0]
        return Detections(boxes, scores, labels, seen)


def evaluated(folder, ranks=ALONE, blind=0, **settings):
    """The evaluation of an oracle, and its figures."""
    config = config_of(folder, **settings)
    data = MaskRCNNEvalData(config, ranks)
    evaluation = Evaluation(config, ranks, Oracle(open_val(folder), blind, config.legacy_boxes))
    with torch.inference_mode():
        return evaluation, evaluation(MODEL, data)


def open_val(folder):
    return coco.read(*coco.layout(folder, "val"), segmentations=True)


@pytest.fixture(scope="module")
def whole(tiny_toy):
    return evaluated(tiny_toy)


def test_a_network_that_sees_all_scores_one_and_nearly_so_for_masks(whole):
    _, figures = whole
    assert set(figures) == {*FIGURES, *(f"mask_{name}" for name in FIGURES)}
    assert figures["AP"] == pytest.approx(1, abs=1e-3)
    assert figures["mask_AP50"] == pytest.approx(1)
    assert 0.85 < figures["mask_AP"] < 1


def test_boxes_without_their_last_pixel_score_one_as_well(tiny_toy):
    _, figures = evaluated(tiny_toy, legacy_boxes=False)
    assert figures["AP"] == pytest.approx(1, abs=1e-3)


def test_the_official_library_confirms_both(whole):
    evaluation, figures = whole
    assert evaluation.confirm() == figures


def test_masks_lie_where_the_objects_are_in_the_original(whole, tiny_toy):
    evaluation, _ = whole
    content = json.loads(coco.layout(tiny_toy, "val")[0].read_text())
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    objects = [a for a in content["annotations"] if not a["iscrowd"]]
    rows, found = evaluation.found
    assert len(rows) == len(found) == len(objects)
    for row, mask in zip(rows, found, strict=True):
        assert mask["size"] == sizes[row[0]]
        near = [a for a in objects if a["image_id"] == row[0] and np.allclose(a["bbox"], row[1:5], atol=0.05)]
        assert [a["category_id"] for a in near] == [row[6]]
        wanted = mask_api.merge(mask_api.frPyObjects(near[0]["segmentation"], *mask["size"]))
        assert mask_api.iou([mask], [wanted], [0])[0, 0] > 0.88


def test_labels_become_the_category_ids_of_the_annotations(whole, tiny_toy, tmp_path):
    folder = shutil.copytree(tiny_toy, tmp_path / "data")
    file, _ = coco.layout(folder, "val")
    content = json.loads(file.read_text())
    for row in content["annotations"]:
        row["category_id"] = 30 - 7 * row["category_id"]  # in another order, too
    for row in content["categories"]:
        row["id"] = 30 - 7 * row["id"]
    file.write_text(json.dumps(content))
    evaluation, figures = evaluated(folder)
    assert figures == pytest.approx(whole[1])
    assert set(evaluation.found.rows[:, 6]) == {23, 16, 9}


def test_what_is_overlooked_costs_both_figures(whole, tiny_toy):
    _, figures = evaluated(tiny_toy, blind=2)
    for name in ("AP", "mask_AP"):
        assert figures[name] < whole[1][name] - 0.1


def test_a_network_that_sees_nothing_scores_zero(tiny_toy):
    config = config_of(tiny_toy)
    evaluation = Evaluation(config, ALONE, lambda model, batch: Detections(*nothing(len(batch.images))))
    assert set(evaluation(MODEL, MaskRCNNEvalData(config, ALONE)).values()) == {0.0}


def nothing(size):
    shapes = ((size, 0, 4), (size, 0), (size, 0), (size, 0, 28, 28))
    return [torch.zeros(shape, dtype=torch.int64 if i == 2 else torch.float32) for i, shape in enumerate(shapes)]


def test_neither_the_batch_size_nor_the_threads_nor_half_precision_change_the_figures(whole, tiny_toy, monkeypatch):
    monkeypatch.setattr("maskrcnn.evaluator.WAITING", 1)
    assert evaluated(tiny_toy, eval_batch_size=8, num_workers=2)[1] == whole[1]
    config = config_of(tiny_toy)
    oracle = Oracle(open_val(tiny_toy))

    def halved(model, batch):
        seen = oracle(model, batch)
        return seen._replace(masks=seen.masks.bfloat16())

    assert Evaluation(config, ALONE, halved)(MODEL, MaskRCNNEvalData(config, ALONE)) == whole[1]


def test_both_results_files_are_in_cocos_format(whole):
    rows, found = whole[0].found
    boxes, outlines = json.loads(json.dumps([to_results(rows), to_mask_results(rows, found)]))
    assert [set(one) for one in (boxes[0], outlines[0])] == [
        {"image_id", "category_id", "bbox", "score"},
        {"image_id", "category_id", "segmentation", "score"},
    ]


def test_every_rank_has_the_figures_of_one_alone_and_the_first_has_all_detections(whole, tiny_toy, tmp_path):
    command = [
        sys.executable,
        "-m",
        "detection.runtime.launch",
        "--nproc-per-node",
        "2",
        __file__,
        str(tiny_toy),
        str(tmp_path),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["figures"] == second["figures"] == whole[1]
    assert (first["found"], second["found"]) == (len(whole[0].found.rows), 0)


def main(data, results):
    with connect(read_topology(), torch.device("cpu"), timeout_s=60) as ranks:
        evaluation, figures = evaluated(data, ranks)
        found = {"figures": figures, "found": len(evaluation.found.rows)}
        (results / f"{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
