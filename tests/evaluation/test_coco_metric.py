import json
import sys

import numpy as np
import pytest
from pycocotools import mask as mask_api

from detection.config.settings import InputError
from detection.data import coco
from detection.evaluation.coco_metric import COCO_STATS, CocoBoxMetric, CocoMaskMetric, to_mask_results, to_results
from paths import shared


@pytest.fixture
def ground_truth(small_toy):
    annotation_file, _ = coco.standard_paths(small_toy, "val")
    return annotation_file, json.loads(annotation_file.read_text())


def gt_rows(content, score=0.9):
    return np.array(
        [[a["image_id"], *a["bbox"], score, a["category_id"]] for a in content["annotations"] if not a["iscrowd"]],
        dtype=np.float64,
    )


def test_ground_truth_scores_one(ground_truth):
    annotation_file, content = ground_truth
    metrics = CocoBoxMetric(annotation_file)(gt_rows(content))
    assert tuple(metrics) == COCO_STATS
    assert metrics["AP"] == pytest.approx(1)
    assert metrics["AR100"] == pytest.approx(1)


def jitter(content, seed):
    """Return detections near the ground truth: some shifted, some of a wrong class, some duplicated."""
    rng = np.random.default_rng(seed)
    rows = np.repeat(gt_rows(content), 3, axis=0)
    rows[:, 1:5] += rng.normal(0, 6, (len(rows), 4))
    rows[:, 3:5] = rows[:, 3:5].clip(1)
    rows[:, 5] = rng.random(len(rows))
    rows[rng.random(len(rows)) < 0.2, 6] = 1
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_hotcoco_and_pycocotools_are_bit_identical(ground_truth, seed):
    annotation_file, content = ground_truth
    rows = jitter(content, seed)
    metrics = CocoBoxMetric(annotation_file, "hotcoco")(rows)
    assert 0 < metrics["AP"] < 1
    assert metrics == CocoBoxMetric(annotation_file, "pycocotools")(rows)


@pytest.mark.data
@pytest.mark.parametrize("name", ["coco-tiny", "bccd"])
def test_backends_agree_on_real_annotations(name):
    annotation_file, _ = coco.standard_paths(shared(f"data/{name}"), "val")
    rows = jitter(json.loads(annotation_file.read_text()), 0)
    assert CocoBoxMetric(annotation_file, "hotcoco")(rows) == CocoBoxMetric(annotation_file)(rows)


def test_auto_uses_pycocotools_for_an_annotation_with_id_0(ground_truth, tmp_path):
    content = ground_truth[1] | {"annotations": [a | {"id": a["id"] - 1} for a in ground_truth[1]["annotations"]]}
    (tmp_path / "val.json").write_text(json.dumps(content))
    rows = jitter(content, 0)
    assert CocoBoxMetric(tmp_path / "val.json", "auto")(rows) == CocoBoxMetric(tmp_path / "val.json")(rows)


def test_auto_uses_pycocotools_for_annotations_that_hotcoco_rejects(ground_truth, tmp_path):
    content = ground_truth[1] | {"info": {"version": 1}}
    (tmp_path / "val.json").write_text(json.dumps(content))
    rows = jitter(content, 0)
    assert CocoBoxMetric(tmp_path / "val.json", "auto")(rows) == CocoBoxMetric(ground_truth[0])(rows)


def test_missing_hotcoco_is_an_error_by_name_and_skipped_by_auto(ground_truth, monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with pytest.raises(InputError, match="--coco-eval-backend hotcoco"):
        CocoBoxMetric(ground_truth[0], "hotcoco")
    assert CocoBoxMetric(ground_truth[0], "auto")(gt_rows(ground_truth[1]))["AP"] == pytest.approx(1)


def test_no_detections_score_zero(ground_truth):
    assert CocoBoxMetric(ground_truth[0])(np.zeros((0, 7)))["AP"] == 0


def test_images_without_detections_count(ground_truth):
    annotation_file, content = ground_truth
    rows = gt_rows(content)
    half = rows[rows[:, 0] <= np.median(rows[:, 0])]
    assert CocoBoxMetric(annotation_file)(half)["AR100"] < 0.9


def test_metric_prints_nothing_and_is_reusable(ground_truth, capsys):
    rows = gt_rows(ground_truth[1])
    for backend in ("hotcoco", "pycocotools"):
        metric = CocoBoxMetric(ground_truth[0], backend)
        assert metric(rows) == metric(rows)
    assert capsys.readouterr().out == ""


def test_pycocotools_reads_the_results_file(ground_truth, tmp_path):
    from pycocotools.coco import COCO

    rows = gt_rows(ground_truth[1])
    (tmp_path / "detections.json").write_text(json.dumps(to_results(rows)))
    loaded = COCO(str(ground_truth[0])).loadRes(str(tmp_path / "detections.json"))
    assert len(loaded.anns) == len(rows)


def gt_masks(content, max_shift_px=0):
    """Return the masks of `gt_rows` as compressed RLE, each shifted at random by up to `max_shift_px`."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    rng = np.random.default_rng(0)
    masks = []
    for annotation in content["annotations"]:
        if not annotation["iscrowd"]:
            polygons = [
                np.add(p, rng.uniform(-max_shift_px, max_shift_px)).tolist() for p in annotation["segmentation"]
            ]
            mask = mask_api.merge(mask_api.frPyObjects(polygons, *sizes[annotation["image_id"]]))
            masks.append({"size": mask["size"], "counts": mask["counts"].decode()})
    return masks


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
def test_ground_truth_masks_score_one_with_any_boxes(ground_truth, backend):
    annotation_file, content = ground_truth
    rows = gt_rows(content)
    rows[:, 1:5] = 1
    metric = CocoMaskMetric(annotation_file, backend)
    metrics = metric.compute_masks(rows, gt_masks(content))
    assert tuple(metrics) == COCO_STATS
    assert metrics["AP"] == pytest.approx(1)
    assert metric(rows)["AP"] < 0.01


@pytest.mark.parametrize("name", ["toy", pytest.param("coco-tiny", marks=pytest.mark.data)])
def test_backends_are_bit_identical_on_masks(ground_truth, name):
    annotation_file, content = ground_truth
    if name != "toy":
        annotation_file, _ = coco.standard_paths(shared(f"data/{name}"), "val")
        content = json.loads(annotation_file.read_text())
    rows = gt_rows(content)
    rows[:, 5] = np.random.default_rng(1).random(len(rows))
    masks = gt_masks(content, max_shift_px=9)
    metrics = CocoMaskMetric(annotation_file, "hotcoco").compute_masks(rows, masks)
    assert 0.05 < metrics["AP"] < 0.95
    rows[:, 1:5] = 1  # boxes, and so their areas, are ignored
    assert metrics == CocoMaskMetric(annotation_file, "pycocotools").compute_masks(rows, masks)


def test_no_masks_score_zero(ground_truth):
    assert CocoMaskMetric(ground_truth[0]).compute_masks(np.zeros((0, 7)), [])["AP"] == 0


def test_mask_metrics_change_neither_box_metrics_nor_their_input(ground_truth):
    annotation_file, content = ground_truth
    metric, rows, masks = CocoMaskMetric(annotation_file, "pycocotools"), jitter(content, 0), gt_masks(content)
    expected = CocoBoxMetric(annotation_file)(rows)
    first = metric.compute_masks(gt_rows(content), masks)
    assert metric(rows) == expected
    assert metric.compute_masks(gt_rows(content), masks) == first
    assert masks == gt_masks(content)


def test_pycocotools_scores_the_results_file_of_masks(ground_truth, tmp_path, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotation_file, content = ground_truth
    (tmp_path / "segm.json").write_text(json.dumps(to_mask_results(gt_rows(content), gt_masks(content))))
    official = COCO(str(annotation_file))
    evaluation = COCOeval(official, official.loadRes(str(tmp_path / "segm.json")), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)
