import json
import sys

import numpy as np
import pytest
from pycocotools import mask as mask_api

from detection.config.settings import InputError
from detection.data import coco
from detection.evaluation.coco_metric import (
    COCO_STATS,
    CocoBoxMetric,
    CocoMaskMetric,
    from_results,
    to_mask_results,
    to_results,
)
from paths import shared


@pytest.fixture
def ground_truth(small_toy):
    split = coco.read(*coco.standard_paths(small_toy, "val"))
    return split, json.loads(split.annotation_file.read_text())


@pytest.fixture
def write_split(small_toy, tmp_path):
    """Return a function that writes annotations of the toy images and reads them."""

    def write(content):
        (tmp_path / "val.json").write_text(json.dumps(content))
        return coco.read(tmp_path / "val.json", small_toy / "val2017", skip_missing_images=True)

    return write


def gt_rows(content, score=0.9):
    """Return detections of all objects. Images and categories are numbered in the order of the file and of the ids."""
    indices = {image["id"]: index for index, image in enumerate(content["images"])}
    labels = {number: label for label, number in enumerate(sorted(c["id"] for c in content["categories"]), start=1)}
    return np.array(
        [
            [indices[a["image_id"]], *a["bbox"], score, labels[a["category_id"]]]
            for a in content["annotations"]
            if not a["iscrowd"]
        ],
        dtype=np.float64,
    )


def test_ground_truth_scores_one(ground_truth):
    split, content = ground_truth
    metrics = CocoBoxMetric(split)(gt_rows(content))
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
    split, content = ground_truth
    rows = jitter(content, seed)
    metrics = CocoBoxMetric(split, "hotcoco")(rows)
    assert 0 < metrics["AP"] < 1
    assert metrics == CocoBoxMetric(split, "pycocotools")(rows)


@pytest.mark.data
@pytest.mark.parametrize("name", ["coco-tiny", "bccd"])
def test_backends_agree_on_real_annotations(name):
    split = coco.read(*coco.standard_paths(shared(f"data/{name}"), "val"))
    rows = jitter(json.loads(split.annotation_file.read_text()), 0)
    assert CocoBoxMetric(split, "hotcoco")(rows) == CocoBoxMetric(split)(rows)


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
@pytest.mark.parametrize("first", [0, -3, 2**53 + 1, 2**63 - 500])
def test_ids_do_not_change_the_metrics(ground_truth, write_split, backend, first):
    split, content = ground_truth
    images = {image["id"]: first + number for number, image in enumerate(content["images"])}
    categories = {
        c["id"]: first + number for number, c in enumerate(sorted(content["categories"], key=lambda c: c["id"]))
    }
    renumbered = {
        "images": [image | {"id": images[image["id"]]} for image in content["images"]],
        "categories": [c | {"id": categories[c["id"]]} for c in content["categories"]],
        "annotations": [
            a | {"id": first + number, "image_id": images[a["image_id"]], "category_id": categories[a["category_id"]]}
            for number, a in enumerate(content["annotations"])
        ],
    }
    renumbered_split = write_split(renumbered)
    metric = CocoBoxMetric(renumbered_split, backend)
    assert metric(gt_rows(renumbered))["AP"] == pytest.approx(1)
    assert metric(jitter(content, 0)) == CocoBoxMetric(split)(jitter(content, 0))
    results = to_results(gt_rows(renumbered), renumbered_split)
    expected = [(a["image_id"], a["category_id"]) for a in renumbered["annotations"] if not a["iscrowd"]]
    assert [(row["image_id"], row["category_id"]) for row in results] == expected


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
def test_order_of_images_in_the_file_does_not_change_the_metrics(ground_truth, write_split, backend):
    split, content = ground_truth
    rows = jitter(content, 0)
    rows[:, 5] = rows[:, 5].round(1)  # ties, which the order of the images decides
    reordered = rows.copy()
    reordered[:, 0] = len(split) - 1 - rows[:, 0]
    metric = CocoBoxMetric(write_split(content | {"images": content["images"][::-1]}), backend)
    assert metric(reordered) == CocoBoxMetric(split)(rows)


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
def test_images_without_a_file_do_not_count(ground_truth, write_split, backend):
    split, content = ground_truth
    missing = [image | {"file_name": "missing.jpg"} if i % 2 else image for i, image in enumerate(content["images"])]
    partial = write_split(content | {"images": missing})
    assert 0 < len(partial) < len(split)
    existing = partial.image_ids.tolist()
    kept = {
        "images": [image for image in content["images"] if image["id"] in existing],
        "annotations": [a for a in content["annotations"] if a["image_id"] in existing],
    }
    assert CocoBoxMetric(partial, backend)(gt_rows(content | kept))["AP"] == pytest.approx(1)


def test_fields_without_a_meaning_for_the_metric_may_have_any_type(ground_truth, write_split):
    split, content = ground_truth
    rows = jitter(content, 0)
    metric = CocoBoxMetric(write_split(content | {"info": {"version": 1}}), "hotcoco")
    assert metric(rows) == CocoBoxMetric(split)(rows)


def test_missing_hotcoco_is_an_error_by_name_and_skipped_by_auto(ground_truth, monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with pytest.raises(InputError, match="--coco-eval-backend hotcoco"):
        CocoBoxMetric(ground_truth[0], "hotcoco")
    assert CocoBoxMetric(ground_truth[0], "auto")(gt_rows(ground_truth[1]))["AP"] == pytest.approx(1)


def test_no_detections_score_zero(ground_truth):
    assert CocoBoxMetric(ground_truth[0])(np.zeros((0, 7)))["AP"] == 0


def test_images_without_detections_count(ground_truth):
    split, content = ground_truth
    rows = gt_rows(content)
    half = rows[rows[:, 0] <= np.median(rows[:, 0])]
    assert CocoBoxMetric(split)(half)["AR100"] < 0.9


def test_metric_prints_nothing_and_is_reusable(ground_truth, capsys):
    rows = gt_rows(ground_truth[1])
    for backend in ("hotcoco", "pycocotools"):
        metric = CocoBoxMetric(ground_truth[0], backend)
        assert metric(rows) == metric(rows)
    assert capsys.readouterr().out == ""


def test_pycocotools_reads_the_results_file(ground_truth, tmp_path):
    from pycocotools.coco import COCO

    rows = gt_rows(ground_truth[1])
    (tmp_path / "detections.json").write_text(json.dumps(to_results(rows, ground_truth[0])))
    loaded = COCO(str(ground_truth[0].annotation_file)).loadRes(str(tmp_path / "detections.json"))
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
    split, content = ground_truth
    rows = gt_rows(content)
    rows[:, 1:5] = 1
    metric = CocoMaskMetric(split, backend)
    metrics = metric.compute_masks(rows, gt_masks(content))
    assert tuple(metrics) == COCO_STATS
    assert metrics["AP"] == pytest.approx(1)
    assert metric(rows)["AP"] < 0.01


@pytest.mark.parametrize("name", ["toy", pytest.param("coco-tiny", marks=pytest.mark.data)])
def test_backends_are_bit_identical_on_masks(ground_truth, name):
    split, content = ground_truth
    if name != "toy":
        split = coco.read(*coco.standard_paths(shared(f"data/{name}"), "val"))
        content = json.loads(split.annotation_file.read_text())
    rows = gt_rows(content)
    rows[:, 5] = np.random.default_rng(1).random(len(rows))
    masks = gt_masks(content, max_shift_px=9)
    metrics = CocoMaskMetric(split, "hotcoco").compute_masks(rows, masks)
    assert 0.05 < metrics["AP"] < 0.95
    rows[:, 1:5] = 1  # boxes, and so their areas, are ignored
    assert metrics == CocoMaskMetric(split, "pycocotools").compute_masks(rows, masks)


def test_no_masks_score_zero(ground_truth):
    assert CocoMaskMetric(ground_truth[0]).compute_masks(np.zeros((0, 7)), [])["AP"] == 0


def test_mask_metrics_change_neither_box_metrics_nor_their_input(ground_truth):
    split, content = ground_truth
    metric, rows, masks = CocoMaskMetric(split, "pycocotools"), jitter(content, 0), gt_masks(content)
    expected = CocoBoxMetric(split)(rows)
    first = metric.compute_masks(gt_rows(content), masks)
    assert metric(rows) == expected
    assert metric.compute_masks(gt_rows(content), masks) == first
    assert masks == gt_masks(content)


def test_pycocotools_scores_the_results_file_of_masks(ground_truth, tmp_path, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    split, content = ground_truth
    (tmp_path / "segm.json").write_text(json.dumps(to_mask_results(gt_rows(content), gt_masks(content), split)))
    official = COCO(str(split.annotation_file))
    evaluation = COCOeval(official, official.loadRes(str(tmp_path / "segm.json")), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


def test_results_read_back_are_the_rows(small_toy):
    split = coco.read(*coco.standard_paths(small_toy, "val"))
    rows = np.array([[1.0, 2.5, 3, 4, 5.25, 0.5, 2], [0, 1, 2, 3, 4, 0.25, 1]])
    assert np.array_equal(from_results(to_results(rows, split), split), rows)
    assert from_results([], split).shape == (0, 7)
