"""Selection and content of the sample predictions of a run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from detection.data import coco, rle
from detection.evaluation import matching, sample_predictions
from detection.evaluation.coco_metric import CocoBoxMetric
from samples import make_detection, make_split


def test_detection_matches_a_free_object_of_its_class_from_iou_0_5():
    big, small = [0.0, 0, 40, 40], [60.0, 60, 80, 80]
    (matches,) = matching.match_images(
        make_split([(big, 1, False), (small, 2, False)]),
        [
            make_detection(10, [0, 0, 40, 21], 3, 0.9),  # IoU above 0.5
            make_detection(10, [0, 0, 40, 40], 3, 0.8),  # the object is already matched
            make_detection(10, small, 3, 0.7),  # another class
            make_detection(10, [60, 60, 80, 69], 7, 0.6),  # IoU below 0.5
            make_detection(10, small, 7, 0.1),  # below the threshold
        ],
        min_score=0.5,
    )
    assert matches.is_matched.tolist() == [True, False]
    assert matches.is_false_positive.tolist() == [False, True, True, True]
    assert matches.largest_missed_px == 400
    assert matches.f1 == pytest.approx(2 * 1 / (2 + 4))
    assert matches.caption == "1 of 2 objects found, 3 false"


def test_crowds_are_not_objects_and_detections_in_them_are_not_false():
    (matches,) = matching.match_images(
        make_split([([0.0, 0, 100, 100], 1, True)]),
        [make_detection(10, [5, 5, 15, 15], 3, 0.9), make_detection(10, [20, 20, 30, 30], 7, 0.8)],
        min_score=0,
    )
    assert matches.caption == "0 of 0 objects found, 1 false"
    assert matches.is_false_positive.tolist() == [False, True]
    assert matches.largest_missed_px == 0


def test_threshold_keeps_as_many_detections_as_objects():
    split = make_split([([0.0, 0, 9, 9], 1, False)] * 2, [([0.0, 0, 9, 9], 1, True)])
    rows = [make_detection(10, [0, 0, 9, 9], 3, score) for score in (0.2, 0.9, 0.4, 0.1)]
    assert matching.pick_threshold(split, rows) == 0.4
    assert matching.pick_threshold(split, []) == 0


def test_each_group_has_its_images_and_none_repeats():
    box = [10.0, 10, 30, 30]
    images = [[(box, 1, False)] for _ in range(20)]
    images[4] = [([0.0, 0, 99, 99], 1, False)]
    rows = [make_detection(10 + n, box, 3, 0.5) for n in range(8, 20)]
    rows += [make_detection(17, [60, 60, 90, 90], 7, 0.99)]
    split = make_split(*images)
    groups = [
        (group, matches.index)
        for group, matches in sample_predictions.select_images(list(matching.match_images(split, rows, 0.0)))
    ]
    assert groups[0] == ("missed", 4)
    assert groups[3] == ("false", 7)
    assert [group for group, _ in groups] == ["missed"] * 3 + ["false"] + ["best"] * 3 + ["typical"] * 3
    assert len({index for _, index in groups}) == len(groups)


@pytest.fixture
def run(small_toy, tmp_path) -> Path:
    """Return the folder of a run that detected exactly the objects of the first image."""
    split = coco.read(*coco.standard_paths(small_toy, "val"))
    rows = [
        make_detection(int(split.image_ids[0]), box.tolist(), split.categories[label - 1].id, 0.8)
        for box, label in zip(split.boxes(0), split.image_labels(0), strict=True)
    ]
    (tmp_path / "detections.json").write_text(json.dumps(rows))
    config = {"data_dir": str(small_toy), "val_annotations": "", "val_images": "", "skip_missing_images": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def read_rows(run: Path) -> list[dict]:
    return json.loads((run / "pictures.json").read_text())


def test_pictures_are_plain_and_their_boxes_are_listed(run, small_toy, capsys):
    assert sample_predictions.main([str(run)]) == 0
    rows = read_rows(run)
    assert capsys.readouterr().out == f"{len(rows)} images\n"
    assert 4 <= len(rows) <= 12
    assert {path.name for path in (run / "pictures").iterdir()} == {row["file"] for row in rows}
    (best,) = (row for row in rows if row["group"] == "best")
    assert {row["state"] for row in best["objects"]} == {"found"}
    assert [row["name"] for row in best["objects"]] == [row["name"] for row in best["detections"]]
    assert {(row["state"], row["score"]) for row in best["detections"]} == {("correct", 0.8)}
    assert best["caption"].endswith("0 false (score ≥ 0.80)")
    split = coco.read(*coco.standard_paths(small_toy, "val"))
    assert best["objects"][0]["box"][:2] == pytest.approx(split.boxes(0)[0, :2].tolist(), abs=0.06)
    missed = next(row for row in rows if row["group"] == "missed")
    assert "missed" in {row["state"] for row in missed["objects"]}
    with Image.open(run / "pictures" / missed["file"]) as picture:
        assert picture.size == (missed["width"], missed["height"])
        with Image.open(
            split.image_path(int(np.flatnonzero(split.image_ids == int(missed["file"][3:-4]))[0]))
        ) as image:
            assert np.abs(np.asarray(picture, dtype=int) - np.asarray(image, dtype=int)).mean() < 8


def test_large_image_and_its_boxes_are_scaled(run, monkeypatch):
    monkeypatch.setattr(sample_predictions, "SIDE_PX", 64)
    sample_predictions.write_samples(run)
    for row in read_rows(run):
        assert max(row["width"], row["height"]) == 64
        with Image.open(run / "pictures" / row["file"]) as picture:
            assert picture.size == (row["width"], row["height"])
        for left, top, width, height in (shape["box"] for shape in row["objects"]):
            assert left + width <= row["width"] + 1
            assert top + height <= row["height"] + 1


@pytest.fixture
def mask_run(run, small_toy) -> Path:
    """Return the folder of such a run with the ground-truth masks."""
    split = coco.read(*coco.standard_paths(small_toy, "val"), segmentations=True)
    rows = json.loads((run / "detections.json").read_text())
    (run / "detections.json").rename(run / "bbox.json")
    masks = [row | {"segmentation": mask} for row, mask in zip(rows, split.masks(0), strict=True)]
    (run / "segm.json").write_text(json.dumps(masks))
    return run


def test_outlines_enclose_the_masks(mask_run, small_toy):
    sample_predictions.write_samples(mask_run)
    (best,) = (row for row in read_rows(mask_run) if row["group"] == "best")
    split = coco.read(*coco.standard_paths(small_toy, "val"), segmentations=True)
    for objects in (best["objects"], best["detections"]):
        assert len(objects) == len(split.masks(0))
        for row, mask in zip(objects, split.masks(0), strict=True):
            assert outline_area(row["mask"]) == pytest.approx(rle.decode_mask(mask).sum(), rel=0.1, abs=20)


def outline_area(path: str) -> float:
    """Return the area that an SVG path of horizontal and vertical lines encloses."""
    x, y = map(float, re.match(r"M(\d+) (\d+)", path).groups())
    points = [(x, y)]
    for command, value in re.findall(r"([HV])(\d+)", path):
        x, y = (float(value), y) if command == "H" else (x, float(value))
        points.append((x, y))
    xs, ys = np.array(points).T
    return abs(np.sum(xs[:-1] * ys[1:] - xs[1:] * ys[:-1])) / 2


def test_outline_of_a_large_mask_is_short_and_scaled():
    pixels = np.zeros((1000, 2000), dtype=np.uint8, order="F")
    pixels[100:900, 200:1800] = 1
    mask = mask_api.encode(pixels)
    outline = sample_predictions.outline_mask(mask, 0.4)
    assert outline_area(outline) == pytest.approx(0.4**2 * 800 * 1600, rel=0.02)
    assert len(outline) < 60
    assert sample_predictions.outline_mask(mask_api.encode(np.asfortranarray(0 * pixels)), 1.0) == ""


def test_sorting_keeps_each_mask_with_its_box():
    box = [0.0, 0, 9, 9]
    rows = [make_detection(10, box, 3, score) | {"segmentation": f"of {score}"} for score in (0.2, 0.4, 0.9)]
    (matches,) = matching.match_images(make_split([(box, 1, False)]), rows, 0.3)
    assert matches.masks == ["of 0.9", "of 0.4"]


def test_boxes_and_masks_of_different_runs_are_rejected(mask_run, capsys):
    (mask_run / "bbox.json").write_text("[]")
    assert sample_predictions.main([str(mask_run)]) == 2
    assert "bbox.json has 0 detections and segm.json" in capsys.readouterr().err


def test_second_call_removes_the_images_of_the_first(run):
    sample_predictions.write_samples(run)
    (run / "pictures" / "11_old.jpg").write_bytes(b"")
    sample_predictions.write_samples(run)
    assert not (run / "pictures" / "11_old.jpg").exists()


def test_run_without_detections_shows_missed_objects(run):
    (run / "detections.json").write_text("[]")
    assert sample_predictions.write_samples(run) > 0
    assert {row["group"] for row in read_rows(run)} == {"missed", "typical"}
    confusion = json.loads((run / "confusion.json").read_text())
    assert confusion["counts"] == []
    assert sum(confusion["objects"]) > 0


def test_missing_file_is_named(run, capsys):
    (run / "detections.json").unlink()
    assert sample_predictions.main([str(run)]) == 2
    assert "detections.json cannot be read" in capsys.readouterr().err
    (run / "detections.json").write_text("[]")
    (run / "config.json").write_text(json.dumps({"data_dir": str(run / "gone"), "skip_missing_images": False}))
    assert sample_predictions.main([str(run)]) == 2
    assert "Set DATADIR to a folder that contains" in capsys.readouterr().err


def test_per_class_ap_averages_to_the_overall_ap(small_toy):
    split = coco.read(*coco.standard_paths(small_toy, "val"))
    ground_truth = json.loads(split.annotation_file.read_text())
    indices = {image_id: index for index, image_id in enumerate(split.image_ids.tolist())}
    rng = np.random.default_rng(0)
    rows = np.array(
        [
            [indices[a["image_id"]], *(np.array(a["bbox"]) + rng.uniform(-4, 4, 4)), rng.uniform(), a["category_id"]]
            for a in ground_truth["annotations"]
        ]
    )
    metric = CocoBoxMetric(split)
    metrics = metric(rows)
    classes = metric.per_class_ap()
    assert [row["name"] for row in classes] == [
        c["name"] for c in sorted(ground_truth["categories"], key=lambda c: c["id"])
    ]
    assert 0 < metrics["AP"] < 1
    assert np.mean([row["AP"] for row in classes]) == pytest.approx(metrics["AP"])
    assert len({row["AP"] for row in classes}) == len(classes)
    for name in ("AP50", "AP75", "APs", "APm", "APl"):
        values = [row[name] for row in classes if row[name] is not None]
        assert (np.mean(values) if values else -1) == pytest.approx(metrics[name])
    for name, ap in (("precision50", "AP50"), ("precision75", "AP75")):
        assert all(len(row[name]) == 101 for row in classes)
        assert np.mean([row[name] for row in classes]) == pytest.approx(metrics[ap], abs=1e-3)
    assert sum(row["objects"] for row in classes) == sum(not a["iscrowd"] for a in ground_truth["annotations"])
    metric(np.zeros((0, 7)))
    assert [row["AP"] for row in metric.per_class_ap()] == [0.0] * len(classes)


def test_class_without_objects_has_no_ap(small_toy, tmp_path):
    annotations, image_dir = coco.standard_paths(small_toy, "val")
    ground_truth = json.loads(annotations.read_text())
    ground_truth["categories"].append({"id": 99, "name": "absent"})
    (tmp_path / "a.json").write_text(json.dumps(ground_truth))
    metric = CocoBoxMetric(coco.read(tmp_path / "a.json", image_dir))
    metric(np.array([[0, 1, 1, 9, 9, 0.9, len(ground_truth["categories"])]]))
    absent = metric.per_class_ap()[-1]
    assert (absent.pop("name"), absent.pop("objects")) == ("absent", 0)
    assert {name for name, value in absent.items() if value not in (None, [])} == set()
