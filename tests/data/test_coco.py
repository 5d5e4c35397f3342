import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from annotation_file import annotation, content, data_folder, read
from detection.config.settings import InputError
from detection.data import coco
from paths import SHARED

SHARED_DATA = SHARED / "data"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return data_folder(tmp_path)


def test_split_has_images_in_file_order_and_boxes_grouped_by_image(folder: Path) -> None:
    split = read(folder, content())
    assert len(split) == 3
    assert split.image_ids.tolist() == [20, 10, 30]
    assert split.sizes_hw.tolist() == [[50, 100], [48, 64], [200, 300]]
    assert split.box_offsets.tolist() == [0, 1, 1, 3]
    assert split.boxes(0).tolist() == [[0, 0, 100, 50]]
    assert split.boxes(1).shape == (0, 4)
    assert split.boxes(2).tolist() == [[10, 20, 40.5, 60], [1, 2, 4, 6]]
    assert split.is_crowd.tolist() == [False, False, True]
    assert split.image_path(1) == folder / "train2017" / "000000000010.jpg"
    assert (split.num_dropped_boxes, split.num_clipped_boxes, split.num_missing_images) == (0, 0, 0)


def test_labels_follow_ascending_category_ids(folder: Path) -> None:
    split = read(folder, content())
    assert split.categories == (coco.Category(1, "person"), coco.Category(7, "train"), coco.Category(90, "toothbrush"))
    assert split.num_classes == 4
    assert split.labels.tolist() == [1, 3, 2]


def test_arrays_have_the_documented_types(folder: Path) -> None:
    split = read(folder, content())
    assert split.image_ids.dtype == split.box_offsets.dtype == split.labels.dtype == np.int64
    assert split.sizes_hw.dtype == np.int32
    assert split.boxes_xyxy.dtype == np.float32
    assert split.is_crowd.dtype == np.bool_
    assert split.file_names.dtype.kind == "S"


def test_drop_empty_images_keeps_images_with_only_crowds(folder: Path) -> None:
    data = content()
    data["annotations"] = data["annotations"][1:]
    split = read(folder, data).drop_empty_images()
    assert split.image_ids.tolist() == [20, 30]
    assert split.image_path(1).name == "000000000030.jpg"
    assert split.boxes(0).tolist() == [[0, 0, 100, 50]]
    assert split.boxes(1).tolist() == [[1, 2, 4, 6]]


def test_file_without_annotations_is_read_only_if_allowed(folder: Path) -> None:
    data = content()
    del data["annotations"]
    with pytest.raises(InputError, match="'annotations' is missing"):
        read(folder, data)
    for segmentations in (False, True):
        split = read(folder, data, allow_unlabeled=True, segmentations=segmentations)
        assert (len(split), len(split.labels), split.is_labeled) == (3, 0, False)
        coco.check_evaluable(split)


@pytest.mark.parametrize("bbox", [[5, 5, 0, 10], [5, 5, 10, 0.0], [5, 5, 1e-9, 3], [-3, 5, 0, 10]])
def test_boxes_of_zero_size_are_dropped_and_counted(folder: Path, bbox: list[float]) -> None:
    data = content()
    data["annotations"].insert(0, annotation(4, bbox=bbox))
    split = read(folder, data)
    assert split.num_dropped_boxes == 1
    assert split.num_clipped_boxes == 0
    assert split.boxes(0).tolist() == [[0, 0, 100, 50]]


def test_boxes_past_the_border_are_clipped_and_counted(folder: Path) -> None:
    data = content()
    data["annotations"].append(annotation(4, image_id=10, bbox=[-5, 40, 100, 100]))
    split = read(folder, data)
    assert split.num_clipped_boxes == 1
    assert split.boxes(1).tolist() == [[0, 40, 64, 48]]


@pytest.mark.parametrize("bbox", [[100, 0, 5, 5], [5, -5, 5, 5], [5, 100, 5, 5], [-5, 5, 5, 5]])
def test_boxes_outside_are_dropped_and_counted_as_in_torchvision(folder: Path, bbox: list[float]) -> None:
    data = content()
    data["annotations"].insert(0, annotation(4, bbox=bbox))
    with pytest.raises(InputError, match="entirely outside"):
        read(folder, data)
    split = read(folder, data, torchvision_boxes=True)
    assert split.num_dropped_boxes == 1
    assert split.boxes(0).tolist() == [[0, 0, 100, 50]]


def test_borders_are_float32_sums_as_in_torchvision(folder: Path) -> None:
    data = content()
    x, width = 10.1, 20.37
    data["annotations"].insert(0, annotation(4, bbox=[x, 5, width, 5]))
    expected = np.float32(x) + np.float32(width)
    assert expected != np.float32(x + width)
    assert read(folder, data, torchvision_boxes=True).boxes(0)[0, 2] == expected
    assert read(folder, data).boxes(0)[0, 2] == np.float32(x + width)


def test_rounding_error_past_the_border_is_clipped_but_not_counted(folder: Path) -> None:
    data = content()
    data["annotations"].append(annotation(4, image_id=10, bbox=[33.34, 8, 30.67, 40]))
    split = read(folder, data)
    assert split.num_clipped_boxes == 0
    assert split.boxes(1)[0, 2] == 64


def test_all_errors_are_reported_in_one_message(folder: Path) -> None:
    data = content()
    data["images"][1]["id"] = 20
    data["annotations"][0]["bbox"] = [float("nan"), 0, 1, 1]
    data["annotations"][1]["category_id"] = 2
    data["annotations"][2]["bbox"] = [500, 0, 1, 1]
    (folder / "train2017" / "000000000010.jpg").unlink()
    with pytest.raises(InputError) as raised:
        read(folder, data)
    first, *errors = str(raised.value).splitlines()
    assert first.endswith("5 errors:")
    for error, expected in zip(
        errors, ["not in train2017/", "duplicate id", "category_id", "NaN", "outside"], strict=True
    ):
        assert expected in error


def test_missing_images_are_an_error_with_count_and_hint(folder: Path) -> None:
    (folder / "train2017" / "000000000010.jpg").unlink()
    message = r"1 of its 3 images are not in train2017/ \(first: 000000000010.jpg\).*--skip-missing-images"
    with pytest.raises(InputError, match=message):
        read(folder, content())


def test_skip_missing_images_drops_them_with_their_boxes(folder: Path) -> None:
    (folder / "train2017" / "000000000020.jpg").unlink()
    split = read(folder, content(), skip_missing_images=True)
    assert split.image_ids.tolist() == [10, 30]
    assert split.num_missing_images == 1
    assert split.box_offsets.tolist() == [0, 0, 2]
    assert split.labels.tolist() == [3, 2]
    assert split.image_path(1).name == "000000000030.jpg"


def test_folder_without_any_image_is_an_error_even_with_skip_missing_images(folder: Path) -> None:
    for path in (folder / "train2017").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="3 of its 3 images are not in train2017/"):
        read(folder, content(), skip_missing_images=True)


def test_images_in_subfolders_are_found(folder: Path) -> None:
    data = content()
    data["images"][0]["file_name"] = "more/20.jpg"
    (folder / "train2017" / "more").mkdir()
    (folder / "train2017" / "more" / "20.jpg").write_bytes(b"")
    assert read(folder, data).image_path(0) == folder / "train2017" / "more" / "20.jpg"


def test_missing_or_empty_data_folder_is_an_error_with_hint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent: No such file or directory\. Set DATADIR"):
        coco.standard_paths(tmp_path / "absent", "train")
    with pytest.raises(InputError, match=r"the folder is empty\. Set DATADIR"):
        coco.standard_paths(tmp_path, "train")


def test_missing_annotation_file_or_image_folder_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"annotations/instances_train2017\.json is missing"):
        coco.standard_paths(folder, "train")
    read(folder, content())
    (folder / "annotations" / "instances_val2017.json").write_text("{}")
    with pytest.raises(InputError, match=r": val2017 is missing"):
        coco.standard_paths(folder, "val")
    with pytest.raises(InputError, match="image folder unreadable"):
        coco.read(folder / "annotations" / "instances_train2017.json", folder / "absent")
    with pytest.raises(InputError, match="cannot be read"):
        coco.read(folder / "absent.json", folder / "train2017")


def test_box_only_annotations_are_used_for_training_only(folder: Path) -> None:
    read(folder, content())
    annotations = folder / "annotations"
    (folder / "val2017").mkdir()
    for name in ("instances_val", "bbox_only_instances_train", "bbox_only_instances_val"):
        (annotations / f"{name}2017.json").write_text("{}")
    assert coco.standard_paths(folder, "train")[0] == annotations / "bbox_only_instances_train2017.json"
    assert coco.standard_paths(folder, "val") == (annotations / "instances_val2017.json", folder / "val2017")
    assert coco.standard_paths(folder, "train", segmentations=True)[0] == annotations / "instances_train2017.json"


@pytest.mark.parametrize("torchvision_boxes", [False, True])
def test_blocks_do_not_change_the_boxes(folder: Path, torchvision_boxes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data = content()
    data["annotations"] += [annotation(4, bbox=[-5, 40, 100, 100]), annotation(5, bbox=[1.1, 2.2, 3.3, 4.4])]
    whole = read(folder, data, torchvision_boxes=torchvision_boxes)
    monkeypatch.setattr(coco, "BOXES_PER_BLOCK", 2)
    split = read(folder, data, torchvision_boxes=torchvision_boxes)
    assert split.boxes_xyxy.tobytes() == whole.boxes_xyxy.tobytes()
    assert split.num_clipped_boxes == whole.num_clipped_boxes == 1


@given(st.lists(st.tuples(st.sampled_from([10, 20, 30]), st.sampled_from([1, 7, 90])), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_each_image_has_its_own_boxes_in_file_order(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int]]
) -> None:
    data = content()
    data["annotations"] = [
        annotation(i, image_id=image, category_id=category, bbox=[i / 8, 1, 2, 3])
        for i, (image, category) in enumerate(rows)
    ]
    folder = tmp_path_factory.mktemp("data")
    (folder / "train2017").mkdir()
    for image in data["images"]:
        (folder / "train2017" / image["file_name"]).touch()
    split = read(folder, data)
    for index, image_id in enumerate([20, 10, 30]):
        image_rows = [(i / 8, category) for i, (image, category) in enumerate(rows) if image == image_id]
        labels = split.image_labels(index)
        assert split.boxes(index)[:, 0].tolist() == [x for x, _ in image_rows]
        assert [split.categories[label - 1].id for label in labels] == [category for _, category in image_rows]


@pytest.mark.data
@pytest.mark.parametrize("name", ["coco-tiny", "bccd"])
@pytest.mark.parametrize("split_name", ["train", "val"])
def test_split_matches_a_real_annotation_file(name: str, split_name: Any) -> None:
    if not (SHARED_DATA / name).is_dir():
        pytest.skip(f"needs ../shared/data/{name}")
    annotation_file, image_dir = coco.standard_paths(SHARED_DATA / name, split_name)
    split = coco.read(annotation_file, image_dir)
    data = json.loads(annotation_file.read_text())
    assert split.image_ids.tolist() == [image["id"] for image in data["images"]]
    assert len(split.labels) + split.num_dropped_boxes == len(data["annotations"])
    assert split.is_crowd.sum() == sum(row["iscrowd"] for row in data["annotations"])
    names = {category["id"]: category["name"] for category in data["categories"]}
    for index, image_id in enumerate(split.image_ids):
        rows = [row for row in data["annotations"] if row["image_id"] == image_id]
        x, y, width, height = np.array([row["bbox"] for row in rows], dtype=float).reshape(-1, 4).T
        hw = split.sizes_hw[index]
        expected = np.stack([x, y, x + width, y + height], axis=1).clip(0, [hw[1], hw[0], hw[1], hw[0]])
        assert split.boxes(index) == pytest.approx(expected, abs=1e-3)
        labels = split.image_labels(index)
        assert [split.categories[i - 1].name for i in labels] == [names[row["category_id"]] for row in rows]
        assert split.image_path(index).is_file()
    assert (np.diff(split.drop_empty_images().box_offsets) > 0).all()
    assert re.fullmatch(r"S\d+", split.file_names.dtype.str[1:])


def test_read_categories_matches_the_full_file(tmp_path):
    file = tmp_path / "instances.json"
    content = {"images": [], "annotations": [{}], "categories": [{"id": 7, "name": "b"}, {"id": 2, "name": "a"}]}
    file.write_text(json.dumps(content))
    assert coco.read_categories(file) == (coco.Category(2, "a"), coco.Category(7, "b"))
    file.write_text("{")
    with pytest.raises(InputError, match=f"{file.name}.*broken JSON"):
        coco.read_categories(file)


@pytest.mark.parametrize("first", [-7, 2**53 + 1])
def test_images_of_any_id_have_different_seeds(folder: Path, first: int) -> None:
    data = content()
    data["images"] = [image | {"id": first + number} for number, image in enumerate(data["images"])]
    data["annotations"] = [annotation(1, image_id=first)]
    split = read(folder, data)
    draws = {np.random.default_rng((0, 1, split.rng_key(index))).random() for index in range(len(split))}
    assert len(draws) == len(split)


def test_labels_of_a_split_follow_the_training_images(folder: Path) -> None:
    train = read(folder, content())  # 1 person, 7 train, 90 toothbrush
    data = content()
    data["categories"] = [{"id": 1, "name": "toothbrush"}, {"id": 2, "name": "train"}]
    data["annotations"] = [annotation(1, category_id=1), annotation(2, category_id=2)]
    split = coco.align_categories(read(folder, data), train)
    assert [category.name for category in split.categories] == ["person", "train", "toothbrush"]
    assert [category.id for category in split.categories] == [3, 2, 1]
    assert split.labels.tolist() == [3, 2]
    assert split.remarks == ("categories: without person of the training images, so the metric leaves them out",)
    data["categories"].append({"id": 3, "name": "cat"})
    with pytest.raises(InputError, match=r"categories: cat is not in .*, which also has person\. Use the same names"):
        coco.align_categories(read(folder, data), train)
    assert coco.align_categories(train, train) is train


def test_repeated_names_cannot_be_matched(folder: Path) -> None:
    data = content()
    data["categories"][0]["name"] = "person"
    train = read(folder, data)
    assert coco.align_categories(read(folder, data), train).categories == train.categories
    data["categories"][0]["id"] = 91
    data["annotations"] = [annotation(1)]
    with pytest.raises(InputError, match="names occur twice"):
        coco.align_categories(read(folder, data), train)


def test_seeds_contain_the_ids(folder: Path) -> None:
    split = read(folder, content())
    assert [split.rng_key(index) for index in range(len(split))] == [20, 10, 30]
