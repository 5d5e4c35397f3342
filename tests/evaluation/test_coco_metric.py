import json
import sys

import numpy as np
import pytest
from pycocotools import mask as mask_api

from detection.config.settings import InputError
from detection.data import coco
from detection.evaluation.coco_metric import FIGURES, BoxMetric, MaskMetric, to_mask_results, to_results
from paths import shared


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


def jittered(content, seed):
    """Detections around the truth: some moved, some of a wrong class, some twice."""
    rng = np.random.default_rng(seed)
    rows = np.repeat(rows_of(content), 3, axis=0)
    rows[:, 1:5] += rng.normal(0, 6, (len(rows), 4))
    rows[:, 3:5] = rows[:, 3:5].clip(1)
    rows[:, 5] = rng.random(len(rows))
    rows[rng.random(len(rows)) < 0.2, 6] = 1
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_the_fast_library_gives_the_official_figures_bit_for_bit(truth, seed):
    annotation_file, content = truth
    rows = jittered(content, seed)
    figures = BoxMetric(annotation_file, "hotcoco")(rows)
    assert 0 < figures["AP"] < 1
    assert figures == BoxMetric(annotation_file, "pycocotools")(rows)


@pytest.mark.data
@pytest.mark.parametrize("name", ["coco-tiny", "bccd"])
def test_the_libraries_agree_on_real_annotations(name):
    annotation_file, _ = coco.layout(shared(f"data/{name}"), "val")
    rows = jittered(json.loads(annotation_file.read_text()), 0)
    assert BoxMetric(annotation_file, "hotcoco")(rows) == BoxMetric(annotation_file)(rows)


def test_an_annotation_of_id_0_is_left_to_the_official_library(truth, tmp_path):
    content = truth[1] | {"annotations": [a | {"id": a["id"] - 1} for a in truth[1]["annotations"]]}
    (tmp_path / "val.json").write_text(json.dumps(content))
    rows = jittered(content, 0)
    assert BoxMetric(tmp_path / "val.json", "auto")(rows) == BoxMetric(tmp_path / "val.json")(rows)


def test_annotations_that_the_fast_library_refuses_are_left_to_the_official_one(truth, tmp_path):
    content = truth[1] | {"info": {"version": 1}}
    (tmp_path / "val.json").write_text(json.dumps(content))
    rows = jittered(content, 0)
    assert BoxMetric(tmp_path / "val.json", "auto")(rows) == BoxMetric(truth[0])(rows)


def test_an_absent_library_is_refused_by_name_and_passed_over_by_auto(truth, monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with pytest.raises(InputError, match="--coco-eval-backend hotcoco"):
        BoxMetric(truth[0], "hotcoco")
    assert BoxMetric(truth[0], "auto")(rows_of(truth[1]))["AP"] == pytest.approx(1)


def test_no_detection_scores_zero(truth):
    assert BoxMetric(truth[0])(np.zeros((0, 7)))["AP"] == 0


def test_images_without_detections_count(truth):
    annotation_file, content = truth
    rows = rows_of(content)
    half = rows[rows[:, 0] <= np.median(rows[:, 0])]
    assert BoxMetric(annotation_file)(half)["AR100"] < 0.9


def test_the_metric_prints_nothing_and_may_be_used_again(truth, capsys):
    rows = rows_of(truth[1])
    for library in ("hotcoco", "pycocotools"):
        metric = BoxMetric(truth[0], library)
        assert metric(rows) == metric(rows)
    assert capsys.readouterr().out == ""


def test_the_results_file_is_what_pycocotools_reads(truth, tmp_path):
    from pycocotools.coco import COCO

    rows = rows_of(truth[1])
    (tmp_path / "detections.json").write_text(json.dumps(to_results(rows)))
    loaded = COCO(str(truth[0])).loadRes(str(tmp_path / "detections.json"))
    assert len(loaded.anns) == len(rows)


def masks_of(content, moved_px=0):
    """The true masks of `rows_of`, as compressed run lengths; moved by up to so many pixels, each otherwise."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    rng = np.random.default_rng(0)
    masks = []
    for annotation in content["annotations"]:
        if not annotation["iscrowd"]:
            polygons = [np.add(p, rng.uniform(-moved_px, moved_px)).tolist() for p in annotation["segmentation"]]
            mask = mask_api.merge(mask_api.frPyObjects(polygons, *sizes[annotation["image_id"]]))
            masks.append({"size": mask["size"], "counts": mask["counts"].decode()})
    return masks


@pytest.mark.parametrize("library", ["hotcoco", "pycocotools"])
def test_the_true_masks_score_one_whatever_their_boxes(truth, library):
    annotation_file, content = truth
    rows = rows_of(content)
    rows[:, 1:5] = 1
    metric = MaskMetric(annotation_file, library)
    figures = metric.masks(rows, masks_of(content))
    assert tuple(figures) == FIGURES
    assert figures["AP"] == pytest.approx(1)
    assert metric(rows)["AP"] < 0.01


@pytest.mark.parametrize("name", ["toy", pytest.param("coco-tiny", marks=pytest.mark.data)])
def test_the_libraries_agree_on_masks_bit_for_bit(truth, name):
    annotation_file, content = truth
    if name != "toy":
        annotation_file, _ = coco.layout(shared(f"data/{name}"), "val")
        content = json.loads(annotation_file.read_text())
    rows = rows_of(content)
    rows[:, 5] = np.random.default_rng(1).random(len(rows))
    masks = masks_of(content, moved_px=9)
    figures = MaskMetric(annotation_file, "hotcoco").masks(rows, masks)
    assert 0.05 < figures["AP"] < 0.95
    rows[:, 1:5] = 1  # boxes, and so their areas, do not count
    assert figures == MaskMetric(annotation_file, "pycocotools").masks(rows, masks)


def test_no_mask_scores_zero(truth):
    assert MaskMetric(truth[0]).masks(np.zeros((0, 7)), [])["AP"] == 0


def test_masks_leave_the_figures_of_boxes_and_what_they_were_given_alone(truth):
    annotation_file, content = truth
    metric, rows, masks = MaskMetric(annotation_file, "pycocotools"), jittered(content, 0), masks_of(content)
    wanted = BoxMetric(annotation_file)(rows)
    first = metric.masks(rows_of(content), masks)
    assert metric(rows) == wanted
    assert metric.masks(rows_of(content), masks) == first
    assert masks == masks_of(content)


def test_the_results_file_of_masks_is_what_pycocotools_scores(truth, tmp_path, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotation_file, content = truth
    (tmp_path / "segm.json").write_text(json.dumps(to_mask_results(rows_of(content), masks_of(content))))
    official = COCO(str(annotation_file))
    evaluation = COCOeval(official, official.loadRes(str(tmp_path / "segm.json")), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)
