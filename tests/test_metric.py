import json

import numpy as np
import pytest

from detection import coco
from detection.metric import FIGURES, BoxMetric, to_results


@pytest.fixture
def truth(tiny_toy):
    annotation_file, _ = coco.layout(tiny_toy, "val")
    return annotation_file, json.loads(annotation_file.read_text())


def rows_of(content, score=0.9):
    return np.array(
        [[a["image_id"], *a["bbox"], score, a["category_id"]] for a in content["annotations"] if not a["iscrowd"]],
        dtype=np.float64,
    )


def test_the_truth_itself_scores_one(truth):
    annotation_file, content = truth
    figures = BoxMetric(annotation_file)(rows_of(content))
    assert tuple(figures) == FIGURES
    assert figures["AP"] == pytest.approx(1)
    assert figures["AR100"] == pytest.approx(1)


def test_no_detection_scores_zero(truth):
    assert BoxMetric(truth[0])(np.zeros((0, 7)))["AP"] == 0


def test_images_without_detections_count(truth):
    annotation_file, content = truth
    rows = rows_of(content)
    half = rows[rows[:, 0] <= np.median(rows[:, 0])]
    assert BoxMetric(annotation_file)(half)["AR100"] < 0.9


def test_the_metric_prints_nothing_and_may_be_used_again(truth, capsys):
    metric = BoxMetric(truth[0])
    rows = rows_of(truth[1])
    assert metric(rows) == metric(rows)
    assert capsys.readouterr().out == ""


def test_the_results_file_is_what_pycocotools_reads(truth, tmp_path):
    from pycocotools.coco import COCO

    rows = rows_of(truth[1])
    (tmp_path / "detections.json").write_text(json.dumps(to_results(rows)))
    loaded = COCO(str(truth[0])).loadRes(str(tmp_path / "detections.json"))
    assert len(loaded.anns) == len(rows)
