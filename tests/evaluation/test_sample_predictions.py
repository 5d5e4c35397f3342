"""Selection and content of the sample predictions of a run."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.data import coco, rle
from detection.data.coco import Category, Split
from detection.evaluation import sample_predictions
from detection.evaluation.coco_metric import CocoBoxMetric


def make_split(*images: list[tuple[list[float], int, bool]]) -> Split:
    """Return a split of images of 100 × 100 pixels. Each box has corners, a label and a crowd flag."""
    boxes = [box for image in images for box in image]
    return Split(
        annotation_file=Path("a.json"),
        image_dir=Path("images"),
        image_ids=np.arange(10, 10 + len(images)),
        file_names=np.array([f"{n}.jpg" for n in range(len(images))], dtype=np.bytes_),
        sizes_hw=np.full((len(images), 2), 100, dtype=np.int32),
        box_offsets=np.cumsum([0, *map(len, images)]),
        boxes_xyxy=np.array([box[0] for box in boxes], dtype=np.float32).reshape(-1, 4),
        labels=np.array([box[1] for box in boxes], dtype=np.int64),
        is_crowd=np.array([box[2] for box in boxes], dtype=bool),
        categories=(Category(3, "disc"), Category(7, "square")),
        num_dropped_boxes=0,
        num_clipped_boxes=0,
        num_missing_images=0,
    )


def make_detection(image_id: int, corners: list[float], category_id: int, score: float) -> dict[str, object]:
    left, top, right, bottom = corners
    box = [left, top, right - left, bottom - top]
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


def test_detection_matches_a_free_object_of_its_class_from_iou_0_5():
    big, small = [0.0, 0, 40, 40], [60.0, 60, 80, 80]
    (matches,) = sample_predictions.match_images(
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
    (matches,) = sample_predictions.match_images(
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
    assert sample_predictions.pick_threshold(split, rows) == 0.4
    assert sample_predictions.pick_threshold(split, []) == 0


def test_each_group_has_its_images_and_none_repeats():
    box = [10.0, 10, 30, 30]
    images = [[(box, 1, False)] for _ in range(20)]
    images[4] = [([0.0, 0, 99, 99], 1, False)]
    rows = [make_detection(10 + n, box, 3, 0.5) for n in range(8, 20)]
    rows += [make_detection(17, [60, 60, 90, 90], 7, 0.99)]
    split = make_split(*images)
    groups = [
        (group, matches.index)
        for group, matches in sample_predictions.select_images(list(sample_predictions.match_images(split, rows, 0.0)))
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


def test_images_show_ground_truth_and_detections_side_by_side(run, small_toy, capsys):
    assert sample_predictions.main([str(run)]) == 0
    rows = json.loads((run / "pictures.json").read_text())
    assert capsys.readouterr().out == f"{len(rows)} images\n"
    assert 4 <= len(rows) <= 12
    assert {path.name for path in (run / "pictures").iterdir()} == {row["file"] for row in rows}
    (best,) = (row for row in rows if row["caption"].startswith("best"))
    words = best["caption"].split()
    assert words[1] == words[3]
    assert "0 false (score ≥ 0.80)" in best["caption"]
    with Image.open(run / "pictures" / best["file"]) as sheet:
        half = (sheet.width - sample_predictions.GAP_PX) // 2
        left = np.asarray(sheet.crop((0, 0, half, sheet.height)), dtype=int)
        right = np.asarray(sheet.crop((half + sample_predictions.GAP_PX, 0, sheet.width, sheet.height)), dtype=int)
    assert 0 < np.abs(left - right).max(axis=2).mean() < 40  # same image and boxes, different texts
    missed = next(row for row in rows if row["caption"].startswith("missed"))
    with Image.open(run / "pictures" / missed["file"]) as sheet:
        assert max(sheet.height, (sheet.width - sample_predictions.GAP_PX) // 2) <= sample_predictions.SIDE_PX


@pytest.fixture
def mask_run(run, small_toy) -> Path:
    """Return the folder of such a run with the ground-truth masks."""
    split = coco.read(*coco.standard_paths(small_toy, "val"), segmentations=True)
    rows = json.loads((run / "detections.json").read_text())
    (run / "detections.json").rename(run / "bbox.json")
    masks = [row | {"segmentation": mask} for row, mask in zip(rows, split.masks(0), strict=True)]
    (run / "segm.json").write_text(json.dumps(masks))
    return run


def read_best(run: Path) -> np.ndarray:
    """Return the sheet of the image with all objects detected."""
    (best,) = (row for row in json.loads((run / "pictures.json").read_text()) if row["caption"].startswith("best"))
    with Image.open(run / "pictures" / best["file"]) as sheet:
        return np.asarray(sheet, dtype=int)


def test_masks_are_drawn_on_both_sides(mask_run, small_toy):
    sample_predictions.render_all(mask_run)
    with_masks = read_best(mask_run)
    (mask_run / "bbox.json").rename(mask_run / "detections.json")
    (mask_run / "segm.json").unlink()
    sample_predictions.render_all(mask_run)
    is_overlaid = np.abs(with_masks - read_best(mask_run)).max(axis=2) > 30
    half = (is_overlaid.shape[1] - sample_predictions.GAP_PX) // 2
    left, right = is_overlaid[:, :half], is_overlaid[:, half + sample_predictions.GAP_PX :]
    split = coco.read(*coco.standard_paths(small_toy, "val"), segmentations=True)
    inside = np.any([rle.decode_mask(mask) for mask in split.masks(0) if mask], axis=0)
    for side in (left, right):
        assert 0.5 * inside.mean() < side.mean() < 1.1 * inside.mean()
    assert (left & right).sum() > 0.8 * left.sum()  # all but the pixels under texts


def test_sorting_keeps_each_mask_with_its_box():
    box = [0.0, 0, 9, 9]
    rows = [make_detection(10, box, 3, score) | {"segmentation": f"of {score}"} for score in (0.2, 0.4, 0.9)]
    (matches,) = sample_predictions.match_images(make_split([(box, 1, False)]), rows, 0.3)
    assert matches.masks == ["of 0.9", "of 0.4"]


def test_boxes_and_masks_of_different_runs_are_rejected(mask_run, capsys):
    (mask_run / "bbox.json").write_text("[]")
    assert sample_predictions.main([str(mask_run)]) == 2
    assert "bbox.json has 0 detections and segm.json" in capsys.readouterr().err


def test_second_call_removes_the_images_of_the_first(run):
    sample_predictions.render_all(run)
    (run / "pictures" / "11_old.jpg").write_bytes(b"")
    sample_predictions.render_all(run)
    assert not (run / "pictures" / "11_old.jpg").exists()


def test_run_without_detections_shows_missed_objects(run):
    (run / "detections.json").write_text("[]")
    assert sample_predictions.render_all(run) > 0
    captions = [row["caption"] for row in json.loads((run / "pictures.json").read_text())]
    assert {caption.split(":")[0] for caption in captions} == {"missed", "typical"}


def test_missing_file_is_named(run, capsys):
    (run / "detections.json").unlink()
    assert sample_predictions.main([str(run)]) == 2
    assert "detections.json cannot be read" in capsys.readouterr().err
    (run / "detections.json").write_text("[]")
    (run / "config.json").write_text(json.dumps({"data_dir": str(run / "gone"), "skip_missing_images": False}))
    assert sample_predictions.main([str(run)]) == 2
    assert "Run ./init_datasets.sh" in capsys.readouterr().err


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
    assert metric.per_class_ap()[-1] == {"name": "absent", "AP": None, "objects": 0}
