"""The pictures of what a run detected: which are chosen, and what they show."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection.data import coco, rle
from detection.data.coco import Category, Split
from detection.evaluation import sample_predictions
from detection.evaluation.coco_metric import BoxMetric


def split_of(*images: list[tuple[list[float], int, bool]]) -> Split:
    """A split of images of 100 × 100 pixels; of each box its corners, label and whether it is a crowd."""
    boxes = [box for image in images for box in image]
    return Split(
        annotation_file=Path("a.json"),
        image_folder=Path("images"),
        image_ids=np.arange(10, 10 + len(images)),
        file_names=np.array([f"{n}.jpg" for n in range(len(images))], dtype=np.bytes_),
        sizes_hw=np.full((len(images), 2), 100, dtype=np.int32),
        box_starts=np.cumsum([0, *map(len, images)]),
        boxes_xyxy=np.array([box[0] for box in boxes], dtype=np.float32).reshape(-1, 4),
        labels=np.array([box[1] for box in boxes], dtype=np.int64),
        crowd=np.array([box[2] for box in boxes], dtype=bool),
        categories=(Category(3, "disc"), Category(7, "square")),
        dropped_boxes=0,
        clipped_boxes=0,
        missing_images=0,
    )


def detection(image_id: int, corners: list[float], category_id: int, score: float) -> dict[str, object]:
    left, top, right, bottom = corners
    box = [left, top, right - left, bottom - top]
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


def test_a_detection_is_right_where_it_overlaps_a_free_object_of_its_class_by_half():
    big, small = [0.0, 0, 40, 40], [60.0, 60, 80, 80]
    (judged,) = sample_predictions.judge(
        split_of([(big, 1, False), (small, 2, False)]),
        [
            detection(10, [0, 0, 40, 21], 3, 0.9),  # more than half
            detection(10, [0, 0, 40, 40], 3, 0.8),  # the object is found already
            detection(10, small, 3, 0.7),  # another class
            detection(10, [60, 60, 80, 69], 7, 0.6),  # less than half
            detection(10, small, 7, 0.1),  # below the threshold
        ],
        least_score=0.5,
    )
    assert judged.found.tolist() == [True, False]
    assert judged.wrong.tolist() == [False, True, True, True]
    assert judged.missed_px == 400
    assert judged.f1 == pytest.approx(2 * 1 / (2 + 4))
    assert judged.caption == "1 of 2 objects found, 3 false"


def test_a_crowd_is_no_object_and_detections_in_it_are_no_mistakes():
    (judged,) = sample_predictions.judge(
        split_of([([0.0, 0, 100, 100], 1, True)]),
        [detection(10, [5, 5, 15, 15], 3, 0.9), detection(10, [20, 20, 30, 30], 7, 0.8)],
        least_score=0,
    )
    assert judged.caption == "0 of 0 objects found, 1 false"
    assert judged.wrong.tolist() == [False, True]
    assert judged.missed_px == 0


def test_as_many_detections_are_shown_as_there_are_objects():
    split = split_of([([0.0, 0, 9, 9], 1, False)] * 2, [([0.0, 0, 9, 9], 1, True)])
    rows = [detection(10, [0, 0, 9, 9], 3, score) for score in (0.2, 0.9, 0.4, 0.1)]
    assert sample_predictions.threshold(split, rows) == 0.4
    assert sample_predictions.threshold(split, []) == 0


def test_each_kind_has_its_images_and_none_comes_twice():
    box = [10.0, 10, 30, 30]
    images = [[(box, 1, False)] for _ in range(20)]
    images[4] = [([0.0, 0, 99, 99], 1, False)]
    rows = [detection(10 + n, box, 3, 0.5) for n in range(8, 20)]
    rows += [detection(17, [60, 60, 90, 90], 7, 0.99)]
    split = split_of(*images)
    kinds = [
        (kind, judged.index)
        for kind, judged in sample_predictions.chosen(list(sample_predictions.judge(split, rows, 0.0)))
    ]
    assert kinds[0] == ("missed", 4)
    assert kinds[3] == ("false", 7)
    assert [kind for kind, _ in kinds] == ["missed"] * 3 + ["false"] + ["best"] * 3 + ["typical"] * 3
    assert len({index for _, index in kinds}) == len(kinds)


@pytest.fixture
def run(tiny_toy, tmp_path) -> Path:
    """A run's folder, in which all objects of the first image were found, and nothing else."""
    split = coco.read(*coco.layout(tiny_toy, "val"))
    rows = [
        detection(int(split.image_ids[0]), box.tolist(), split.categories[label - 1].id, 0.8)
        for box, label in zip(split.boxes(0), split.image_labels(0), strict=True)
    ]
    (tmp_path / "detections.json").write_text(json.dumps(rows))
    config = {"data_dir": str(tiny_toy), "val_annotations": "", "val_images": "", "skip_missing_images": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_the_pictures_show_truth_and_detections_beside_each_other(run, tiny_toy, capsys):
    assert sample_predictions.main([str(run)]) == 0
    rows = json.loads((run / "pictures.json").read_text())
    assert capsys.readouterr().out == f"{len(rows)} pictures\n"
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
    assert 0 < np.abs(left - right).max(axis=2).mean() < 40  # the same picture and boxes, other texts
    missed = next(row for row in rows if row["caption"].startswith("missed"))
    with Image.open(run / "pictures" / missed["file"]) as sheet:
        assert max(sheet.height, (sheet.width - sample_predictions.GAP_PX) // 2) <= sample_predictions.SIDE_PX


@pytest.fixture
def mask_run(run, tiny_toy) -> Path:
    """The same of a network with masks, each of which is what the truth says."""
    split = coco.read(*coco.layout(tiny_toy, "val"), segmentations=True)
    rows = json.loads((run / "detections.json").read_text())
    (run / "detections.json").rename(run / "bbox.json")
    masks = [row | {"segmentation": mask} for row, mask in zip(rows, split.masks(0), strict=True)]
    (run / "segm.json").write_text(json.dumps(masks))
    return run


def best_of(run: Path) -> np.ndarray:
    """The picture of the image whose objects were all found."""
    (best,) = (row for row in json.loads((run / "pictures.json").read_text()) if row["caption"].startswith("best"))
    with Image.open(run / "pictures" / best["file"]) as sheet:
        return np.asarray(sheet, dtype=int)


def test_masks_are_drawn_on_both_sides(mask_run, tiny_toy):
    sample_predictions.make(mask_run)
    with_masks = best_of(mask_run)
    (mask_run / "bbox.json").rename(mask_run / "detections.json")
    (mask_run / "segm.json").unlink()
    sample_predictions.make(mask_run)
    tinted = np.abs(with_masks - best_of(mask_run)).max(axis=2) > 30
    half = (tinted.shape[1] - sample_predictions.GAP_PX) // 2
    left, right = tinted[:, :half], tinted[:, half + sample_predictions.GAP_PX :]
    split = coco.read(*coco.layout(tiny_toy, "val"), segmentations=True)
    inside = np.any([rle.bitmap(mask) for mask in split.masks(0) if mask], axis=0)
    for side in (left, right):
        assert 0.5 * inside.mean() < side.mean() < 1.1 * inside.mean()
    assert (left & right).sum() > 0.8 * left.sum()  # where texts do not cover it


def test_a_mask_stays_with_its_box_when_they_are_ordered():
    box = [0.0, 0, 9, 9]
    rows = [detection(10, box, 3, score) | {"segmentation": f"of {score}"} for score in (0.2, 0.4, 0.9)]
    (judged,) = sample_predictions.judge(split_of([(box, 1, False)]), rows, 0.3)
    assert judged.masks == ["of 0.9", "of 0.4"]


def test_boxes_and_masks_that_are_not_of_one_run_are_refused(mask_run, capsys):
    (mask_run / "bbox.json").write_text("[]")
    assert sample_predictions.main([str(mask_run)]) == 2
    assert "bbox.json has 0 detections and segm.json" in capsys.readouterr().err


def test_a_second_time_leaves_no_picture_of_the_first(run):
    sample_predictions.make(run)
    (run / "pictures" / "11_old.jpg").write_bytes(b"")
    sample_predictions.make(run)
    assert not (run / "pictures" / "11_old.jpg").exists()


def test_a_run_that_detected_nothing_has_pictures_of_what_it_missed(run):
    (run / "detections.json").write_text("[]")
    assert sample_predictions.make(run) > 0
    captions = [row["caption"] for row in json.loads((run / "pictures.json").read_text())]
    assert {caption.split(":")[0] for caption in captions} == {"missed", "typical"}


def test_what_is_missing_is_named(run, capsys):
    (run / "detections.json").unlink()
    assert sample_predictions.main([str(run)]) == 2
    assert "detections.json cannot be read" in capsys.readouterr().err
    (run / "detections.json").write_text("[]")
    (run / "config.json").write_text(json.dumps({"data_dir": str(run / "gone"), "skip_missing_images": False}))
    assert sample_predictions.main([str(run)]) == 2
    assert "Run ./init_datasets.sh" in capsys.readouterr().err


def test_figures_by_class_average_to_the_figure_of_all(tiny_toy):
    annotations, _ = coco.layout(tiny_toy, "val")
    truth = json.loads(annotations.read_text())
    rng = np.random.default_rng(0)
    rows = np.array(
        [
            [a["image_id"], *(np.array(a["bbox"]) + rng.uniform(-4, 4, 4)), rng.uniform(), a["category_id"]]
            for a in truth["annotations"]
        ]
    )
    metric = BoxMetric(annotations)
    figures = metric(rows)
    classes = metric.by_class()
    assert [row["name"] for row in classes] == [c["name"] for c in sorted(truth["categories"], key=lambda c: c["id"])]
    assert 0 < figures["AP"] < 1
    assert np.mean([row["AP"] for row in classes]) == pytest.approx(figures["AP"])
    assert len({row["AP"] for row in classes}) == len(classes)
    assert sum(row["objects"] for row in classes) == sum(not a["iscrowd"] for a in truth["annotations"])
    metric(np.zeros((0, 7)))
    assert [row["AP"] for row in metric.by_class()] == [0.0] * len(classes)


def test_a_class_without_objects_has_no_figure(tiny_toy, tmp_path):
    annotations, _ = coco.layout(tiny_toy, "val")
    truth = json.loads(annotations.read_text())
    truth["categories"].append({"id": 99, "name": "absent"})
    (tmp_path / "a.json").write_text(json.dumps(truth))
    metric = BoxMetric(tmp_path / "a.json")
    box = truth["annotations"][0]
    metric(np.array([[box["image_id"], *box["bbox"], 0.9, 99]]))
    assert metric.by_class()[-1] == {"name": "absent", "AP": None, "objects": 0}
