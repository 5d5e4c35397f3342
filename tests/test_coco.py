import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from conftest import shared
from detection import coco
from detection.config import InputError

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def content() -> dict[str, Any]:
    """Three images, the second without boxes, and categories whose ids have gaps and no order."""
    return {
        "info": {},
        "licenses": [],
        "images": [
            {"id": 20, "file_name": "000000000020.jpg", "width": 100, "height": 50},
            {"id": 10, "file_name": "000000000010.jpg", "width": 64, "height": 48},
            {"id": 30, "file_name": "000000000030.jpg", "width": 300, "height": 200},
        ],
        "annotations": [
            annotation(1, image_id=30, category_id=90, bbox=[10, 20, 30.5, 40]),
            annotation(2, image_id=20, category_id=1, bbox=[0, 0, 100, 50]),
            annotation(3, image_id=30, category_id=7, bbox=[1, 2, 3, 4], iscrowd=1),
        ],
        "categories": [
            {"id": 90, "name": "toothbrush"},
            {"id": 1, "name": "person"},
            {"id": 7, "name": "train"},
        ],
    }


def annotation(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "id": number,
        "image_id": 20,
        "category_id": 1,
        "bbox": [5, 5, 10, 10],
        "area": 100.0,
        "iscrowd": 0,
    }
    return row | {"segmentation": [[5, 5, 15, 5, 15, 15]]} | changes


def read(folder: Path, data: Any, **how: bool) -> coco.Split:
    text = data if isinstance(data, str) else json.dumps(data)
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "train2017").mkdir(exist_ok=True)
    (folder / "annotations" / "instances_train2017.json").write_text(text)
    return coco.read(*coco.layout(folder, "train"), **how)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with the images of `content`, without annotations."""
    (tmp_path / "train2017").mkdir()
    for image in content()["images"]:
        (tmp_path / "train2017" / image["file_name"]).write_bytes(b"not looked at")
    return tmp_path


def test_a_split_holds_images_in_file_order_and_boxes_by_image(folder: Path) -> None:
    split = read(folder, content())
    assert len(split) == 3
    assert split.image_ids.tolist() == [20, 10, 30]
    assert split.sizes_hw.tolist() == [[50, 100], [48, 64], [200, 300]]
    assert split.box_starts.tolist() == [0, 1, 1, 3]
    assert split.boxes(0).tolist() == [[0, 0, 100, 50]]
    assert split.boxes(1).shape == (0, 4)
    assert split.boxes(2).tolist() == [[10, 20, 40.5, 60], [1, 2, 4, 6]]
    assert split.crowd.tolist() == [False, False, True]
    assert split.image_path(1) == folder / "train2017" / "000000000010.jpg"
    assert (split.dropped_boxes, split.clipped_boxes, split.missing_images) == (0, 0, 0)


def test_labels_follow_the_ascending_category_ids(folder: Path) -> None:
    split = read(folder, content())
    assert split.categories == (
        coco.Category(1, "person"),
        coco.Category(7, "train"),
        coco.Category(90, "toothbrush"),
    )
    assert split.num_classes == 4
    assert split.labels.tolist() == [1, 3, 2]


def test_the_arrays_have_the_types_that_the_docstring_names(folder: Path) -> None:
    split = read(folder, content())
    assert split.image_ids.dtype == split.box_starts.dtype == split.labels.dtype == np.int64
    assert split.sizes_hw.dtype == np.int32
    assert split.boxes_xyxy.dtype == np.float32
    assert split.crowd.dtype == np.bool_
    assert split.file_names.dtype.kind == "S"


def test_images_without_boxes_are_left_out_of_training_but_crowds_stay(folder: Path) -> None:
    data = content()
    data["annotations"] = data["annotations"][1:]
    split = read(folder, data).with_boxes()
    assert split.image_ids.tolist() == [20, 30]
    assert split.image_path(1).name == "000000000030.jpg"
    assert split.boxes(0).tolist() == [[0, 0, 100, 50]]
    assert split.boxes(1).tolist() == [[1, 2, 4, 6]]


@pytest.mark.parametrize("bbox", [[5, 5, 0, 10], [5, 5, 10, 0.0], [5, 5, 1e-9, 3], [-3, 5, 0, 10]])
def test_boxes_of_zero_size_are_dropped_and_counted(folder: Path, bbox: list[float]) -> None:
    data = content()
    data["annotations"].insert(0, annotation(4, bbox=bbox))
    split = read(folder, data)
    assert split.dropped_boxes == 1
    assert split.clipped_boxes == 0
    assert split.boxes(0).tolist() == [[0, 0, 100, 50]]


def test_boxes_past_the_border_are_clipped_and_counted(folder: Path) -> None:
    data = content()
    data["annotations"].append(annotation(4, image_id=10, bbox=[-5, 40, 100, 100]))
    split = read(folder, data)
    assert split.clipped_boxes == 1
    assert split.boxes(1).tolist() == [[0, 40, 64, 48]]


def test_a_rounding_past_the_border_is_clipped_but_not_counted(folder: Path) -> None:
    data = content()
    data["annotations"].append(annotation(4, image_id=10, bbox=[33.34, 8, 30.67, 40]))
    split = read(folder, data)
    assert split.clipped_boxes == 0
    assert split.boxes(1)[0, 2] == 64


def without(table: str, key: str) -> Callable[[dict[str, Any]], None]:
    return lambda data: data[table][1].pop(key)


def with_value(table: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data[table][1].update({key: value})


MISTAKES = {
    "nan": (
        with_value("annotations", "bbox", [0, 0, float("nan"), 1]),
        r"boxes with NaN or infinity: 1 of 3",
    ),
    "inf": (
        with_value("annotations", "bbox", [0, float("-inf"), float("inf"), 1]),
        r"NaN or infinity: 1 of 3",
    ),
    "negative": (
        with_value("annotations", "bbox", [9, 9, -2, 1]),
        r"negative width or height: 1 of 3.*annotation 2",
    ),
    "right of it": (with_value("annotations", "bbox", [100, 0, 5, 5]), r"wholly outside their image: 1 of 3"),
    "above it": (with_value("annotations", "bbox", [5, -5, 5, 5]), r"wholly outside their image: 1 of 3"),
    "three numbers": (
        with_value("annotations", "bbox", [5, 5, 5]),
        r"'bbox' that is not 4 numbers.*annotations\[1\]",
    ),
    "text in a box": (with_value("annotations", "bbox", [5, 5, 5, "5"]), r"'bbox' that is not 4 numbers"),
    "no list": (with_value("annotations", "bbox", None), r"'bbox' that is not a list"),
    "huge": (with_value("annotations", "bbox", [10**400, 1, 1, 1]), r"'bbox' of more than 64 bits"),
    "unknown category": (
        with_value("annotations", "category_id", 5),
        r"unknown category_id: 1 of 3.*category_id 5",
    ),
    "unknown image": (with_value("annotations", "image_id", 11), r"unknown image_id: 1 of 3.*image_id 11"),
    "huge id": (with_value("annotations", "image_id", 2**64), r"'image_id' of more than 64 bits"),
    "float id": (with_value("images", "id", 1.5), r"'id' that is not a whole number \(first: images\[1\]\)"),
    "image id twice": (with_value("images", "id", 20), r"images whose id is taken: 1 of 3 \(first: 20\)"),
    "category id twice": (
        lambda data: data["categories"].append({"id": 90, "name": "again"}),
        r"categories whose id is taken: 1 of 4 \(first: 90\)",
    ),
    "annotation id twice": (with_value("annotations", "id", 1), r"annotations whose id is taken: 1 of 3"),
    "no height": (with_value("images", "height", 0), r"not in 1 to 65535: 1 of 3 \(first: image 10, 64×0\)"),
    "name is a number": (with_value("images", "file_name", 7), r"'file_name' that is not text"),
    "no file_name": (
        without("images", "file_name"),
        r"1 of 3 images have no 'file_name' \(first: images\[1\]\)",
    ),
    "no width": (without("images", "width"), r"1 of 3 images have no 'width'"),
    "no bbox": (without("annotations", "bbox"), r"1 of 3 annotations have no 'bbox'"),
    "no area": (without("annotations", "area"), r"1 of 3 annotations have no 'area'"),
    "no iscrowd": (without("annotations", "iscrowd"), r"1 of 3 annotations have no 'iscrowd'"),
    "no name": (without("categories", "name"), r"1 of 3 categories have no 'name'"),
    "no images": (lambda data: data["images"].clear(), r"'images' is empty"),
    "no boxes": (lambda data: data["annotations"].clear(), r"'annotations' is empty"),
    "no categories": (lambda data: data.pop("categories"), r"'categories' is missing"),
    "no table": (lambda data: data.update(images="none"), r"'images' is no list"),
    "no rows": (lambda data: data["images"].append(3), r"1 of 4 images are no JSON objects"),
    "only empty boxes": (
        lambda data: [row.update(bbox=[1, 1, 0, 0]) for row in data["annotations"]],
        r"nothing to learn",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_annotations_is_refused_by_name_and_place(folder: Path, mistake: str) -> None:
    change, message = MISTAKES[mistake]
    data = content()
    change(data)
    with pytest.raises(InputError, match=message) as refusal:
        read(folder, data)
    assert str(refusal.value).startswith(str(folder / "annotations" / "instances_train2017.json"))
    assert "\n" not in str(refusal.value)


def test_all_mistakes_come_in_one_message(folder: Path) -> None:
    data = content()
    data["images"][1]["id"] = 20
    data["annotations"][0]["bbox"] = [float("nan"), 0, 1, 1]
    data["annotations"][1]["category_id"] = 2
    data["annotations"][2]["bbox"] = [500, 0, 1, 1]
    (folder / "train2017" / "000000000010.jpg").unlink()
    with pytest.raises(InputError) as refusal:
        read(folder, data)
    first, *mistakes = str(refusal.value).splitlines()
    assert first.endswith("5 mistakes:")
    for mistake, expected in zip(
        mistakes, ["not in train2017/", "id is taken", "category_id", "NaN", "outside"], strict=True
    ):
        assert expected in mistake


SQUARE = [[5, 5, 15, 5, 15, 15, 5, 15]]


def lines(split: coco.Split, box: int) -> list[list[list[float]]]:
    """The lines of a box's mask, each as its points."""
    outlines = split.outlines
    assert outlines is not None
    numbers = range(outlines.line_starts[box], outlines.line_starts[box + 1])
    starts = outlines.point_starts
    return [outlines.points_xy[starts[i] : starts[i + 1]].tolist() for i in numbers]


def test_masks_are_kept_on_request_only(folder: Path) -> None:
    assert read(folder, content()).outlines is None
    outlines = read(folder, content(), segmentations=True).outlines
    assert outlines is not None
    assert outlines.points_xy.dtype == np.float32
    assert outlines.line_starts.dtype == outlines.point_starts.dtype == np.int64


def test_polygons_of_several_parts_are_closed_and_go_with_their_box(folder: Path) -> None:
    data = content()
    data["annotations"][0]["segmentation"] = [[1, 2, 3.5, 4, 5, 6], *SQUARE]
    split = read(folder, data, segmentations=True)
    assert lines(split, 0) == [[[5, 5], [15, 5], [15, 15], [5, 5]]]
    assert lines(split, 1) == [
        [[1, 2], [3.5, 4], [5, 6], [1, 2]],
        [[5, 5], [15, 5], [15, 15], [5, 15], [5, 5]],
    ]
    assert lines(split, 2) == []


@pytest.mark.parametrize("compressed", [False, True])
def test_run_lengths_become_upright_borders(folder: Path, compressed: bool) -> None:
    """Of an image of 4×5 the second column from its third pixel, the third column whole, the fourth to its first."""
    data = content()
    data["images"][1].update(width=4, height=5)
    mask = {"size": [5, 4], "counts": [7, 2, 1, 6, 4]}
    if compressed:
        mask["counts"] = mask_api.frPyObjects(mask, 5, 4)["counts"].decode()
    row = annotation(4, image_id=10, bbox=[1, 0, 3, 5], segmentation=mask)
    data["annotations"].append(row)
    found = lines(read(folder, data, segmentations=True), 1)
    down = [[1, 2], [1, 4]], [[2, 0], [2, 5]], [[3, 0], [3, 1]]
    up = [[2, 4], [2, 2]], [[3, 5], [3, 0]], [[4, 1], [4, 0]]
    assert sorted(found) == sorted([list(line) for line in (*down, *up)])


@pytest.mark.parametrize("compressed", [False, True])
def test_a_mask_of_run_lengths_is_given_back(folder: Path, compressed: bool) -> None:
    data = content()
    data["images"][1].update(width=4, height=5)
    mask = {"size": [5, 4], "counts": [1, 2, 4, 9, 1, 1, 2]}
    whole = mask_api.frPyObjects(mask, 5, 4)
    if compressed:
        mask["counts"] = whole["counts"].decode()
    data["annotations"].append(annotation(4, image_id=10, bbox=[0, 0, 4, 5], segmentation=mask))
    (found,) = read(folder, data, segmentations=True).masks(1)
    assert found == {"size": [5, 4], "counts": whole["counts"].decode()}


def check_masks(annotation_file: Path, image_folder: Path) -> None:
    """Hold the masks of all boxes against those of pycocotools."""
    split = coco.read(annotation_file, image_folder, allow_missing=True, segmentations=True)
    official = COCO(str(annotation_file))
    seen = 0
    for index, image_id in enumerate(split.image_ids.tolist()):
        rows = [row for row in official.imgToAnns[image_id] if min(row["bbox"][2:]) > 0]
        for mask, row in zip(split.masks(index), rows, strict=True):
            assert (mask is None) == row["iscrowd"]
            if mask:
                seen += 1
                assert mask["counts"] == official.annToRLE(row)["counts"].decode()
    assert seen > 10


def test_masks_are_those_of_pycocotools(tiny_toy: Path) -> None:
    check_masks(*coco.layout(tiny_toy, "val", segmentations=True))


@pytest.mark.data
@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_of_photos_are_those_of_pycocotools(split: Literal["train", "val"]) -> None:
    check_masks(*coco.layout(shared("data/coco-tiny"), split, segmentations=True))


def test_crowds_are_left_out_on_request_and_have_no_outline(folder: Path) -> None:
    data = content()
    spots = {"size": [200, 300], "counts": [5, 10, 59_985]}
    data["annotations"].insert(0, annotation(4, image_id=30, iscrowd=1, segmentation=spots))
    data["annotations"].append(annotation(5, image_id=30, segmentation=SQUARE))
    split = read(folder, data, segmentations=True)
    assert [split.crowd[1], split.crowd[3]] == [True, True]
    assert lines(split, 1) == lines(split, 3) == []
    left = split.without_crowds()
    assert left.image_ids.tolist() == [20, 10, 30]
    assert left.box_starts.tolist() == [0, 1, 1, 3]
    assert left.labels.tolist() == [1, 3, 1]
    assert left.boxes(2).tolist() == [[10, 20, 40.5, 60], [5, 5, 15, 15]]
    assert not left.crowd.any()
    assert [len(lines(left, box)) for box in range(3)] == [1, 1, 1]
    assert lines(left, 2) == lines(split, 4)
    assert read(folder, data).without_crowds().outlines is None


BAD_MASKS = {
    "odd": ([[1, 2, 3, 4, 5, 6, 7]], "a polygon of 7 coordinates, which is odd"),
    "two points": ([*SQUARE, [1, 2, 3, 4]], "a polygon of 2 points, where 3 are the least"),
    "none": (None, "it is missing"),
    "empty": ([], "no polygon is in it"),
    "text": ("masks/2.png", "neither polygons nor run lengths"),
    "text in it": ([[1, 2, 3, 4, 5, "6"]], "neither polygons nor run lengths"),
    "no counts": ({"size": [50, 100]}, "neither polygons nor run lengths"),
    "another size": ({"size": [100, 50], "counts": [5000]}, "run lengths of 50×100 pixels, and the image has 100×50"),
    "too few": ({"size": [50, 100], "counts": [10, 20]}, "run lengths that do not add up to 100×50 pixels"),
    "negative": ({"size": [50, 100], "counts": [6000, -1000]}, "run lengths that do not add up"),
    "too few in text": ({"size": [50, 100], "counts": "d0"}, "run lengths that do not add up"),
    "foreign text": ({"size": [50, 100], "counts": "~é"}, "run lengths in a text that is not COCO's"),
    "endless text": ({"size": [50, 100], "counts": "o" * 99}, "run lengths in a text that is not COCO's"),
    "broken text": ({"size": [50, 100], "counts": "PP"}, "run lengths in a text that breaks off"),
    "infinite": ([[1, 2, 3, 4, 5, float("inf")]], "a polygon with NaN or infinity"),
}


@pytest.mark.parametrize("mistake", BAD_MASKS)
def test_a_bad_mask_is_refused_by_its_annotation(folder: Path, mistake: str) -> None:
    segmentation, message = BAD_MASKS[mistake]
    data = content()
    data["annotations"][1]["segmentation"] = segmentation
    with pytest.raises(InputError) as refusal:
        read(folder, data, segmentations=True)
    assert str(refusal.value).startswith(str(folder / "annotations" / "instances_train2017.json"))
    where = "segmentation is no mask: 1 of 3 (first: annotation 2, image_id 20: "
    assert where + message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(read(folder, data)) == 3  # boxes alone need none


def test_annotations_without_masks_are_refused_and_counted(folder: Path) -> None:
    data = content()
    for row in data["annotations"]:
        del row["segmentation"]
    with pytest.raises(InputError, match=r"no mask: 3 of 3 \(first: annotation 2, image_id 20: it is missing\)"):
        read(folder, data, segmentations=True)


def test_masks_are_the_same_where_the_file_is_read_by_the_slow_way(folder: Path) -> None:
    data = content()
    wanted = read(folder, data, segmentations=True)
    data["images"][0]["id"] = True  # a number to Python's reader alone
    for row in data["annotations"]:
        row["image_id"] = {20: 1}.get(row["image_id"], row["image_id"])
    got = read(folder, data, segmentations=True)
    assert [lines(got, box) for box in range(3)] == [lines(wanted, box) for box in range(3)]


def test_broken_json_is_refused_with_line_and_column(folder: Path) -> None:
    with pytest.raises(InputError, match=r"instances_train2017\.json, line 2, column 10: broken JSON"):
        read(folder, '{"info": {},\n"images" 3}')


@pytest.mark.parametrize("text", ["[1, 2]", "3", "", '{"images": ' + "[" * 100_000, '{"images": ' + "9" * 5000 + "}"])
def test_a_file_of_other_content_is_refused(folder: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"broken JSON|a JSON object is expected"):
        read(folder, text)


def test_a_file_that_is_no_text_is_refused(folder: Path) -> None:
    file = folder / "binary.json"
    file.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(InputError, match="broken JSON"):
        coco.read(file, folder / "train2017")


def test_absent_images_are_refused_with_their_number_and_what_to_do(folder: Path) -> None:
    (folder / "train2017" / "000000000010.jpg").unlink()
    message = r"names 3 images, 1 of them are not in train2017/ \(first: 000000000010.jpg\).*--allow-missing"
    with pytest.raises(InputError, match=message):
        read(folder, content())


def test_absent_images_are_left_out_with_their_boxes_when_allowed(folder: Path) -> None:
    (folder / "train2017" / "000000000020.jpg").unlink()
    split = read(folder, content(), allow_missing=True)
    assert split.image_ids.tolist() == [10, 30]
    assert split.missing_images == 1
    assert split.box_starts.tolist() == [0, 0, 2]
    assert split.labels.tolist() == [3, 2]
    assert split.image_path(1).name == "000000000030.jpg"


def test_a_folder_without_any_of_the_images_is_refused_even_when_absence_is_allowed(folder: Path) -> None:
    for path in (folder / "train2017").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="none of its 3 images"):
        read(folder, content(), allow_missing=True)


def test_images_in_subfolders_are_found(folder: Path) -> None:
    data = content()
    data["images"][0]["file_name"] = "more/20.jpg"
    (folder / "train2017" / "more").mkdir()
    (folder / "train2017" / "more" / "20.jpg").write_bytes(b"")
    assert read(folder, data).image_path(0) == folder / "train2017" / "more" / "20.jpg"


def test_a_missing_or_empty_data_folder_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent: No such file or directory\. Run \./init_datasets\.sh"):
        coco.layout(tmp_path / "absent", "train")
    with pytest.raises(InputError, match=r"the folder is empty\. Run \./init_datasets\.sh"):
        coco.layout(tmp_path, "train")


def test_a_missing_annotation_file_or_image_folder_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(InputError, match=r"annotations/instances_train2017\.json is missing"):
        coco.layout(folder, "train")
    read(folder, content())
    (folder / "annotations" / "instances_val2017.json").write_text("{}")
    with pytest.raises(InputError, match=r": val2017 is missing"):
        coco.layout(folder, "val")
    with pytest.raises(InputError, match="no folder of images"):
        coco.read(folder / "annotations" / "instances_train2017.json", folder / "absent")
    with pytest.raises(InputError, match="cannot be read"):
        coco.read(folder / "absent.json", folder / "train2017")


def test_shrunken_annotations_are_taken_for_training_only(folder: Path) -> None:
    read(folder, content())
    annotations = folder / "annotations"
    (folder / "val2017").mkdir()
    for name in ("instances_val", "bbox_only_instances_train", "bbox_only_instances_val"):
        (annotations / f"{name}2017.json").write_text("{}")
    assert coco.layout(folder, "train")[0] == annotations / "bbox_only_instances_train2017.json"
    assert coco.layout(folder, "val") == (annotations / "instances_val2017.json", folder / "val2017")
    assert coco.layout(folder, "train", segmentations=True)[0] == annotations / "instances_train2017.json"


@given(st.lists(st.tuples(st.sampled_from([10, 20, 30]), st.sampled_from([1, 7, 90])), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_each_image_gets_its_own_boxes_in_file_order(
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
        of_image = [(i / 8, category) for i, (image, category) in enumerate(rows) if image == image_id]
        labels = split.image_labels(index)
        assert split.boxes(index)[:, 0].tolist() == [x for x, _ in of_image]
        assert [split.categories[label - 1].id for label in labels] == [category for _, category in of_image]


@pytest.mark.data
@pytest.mark.parametrize("name", ["coco-tiny", "bccd"])
@pytest.mark.parametrize("part", ["train", "val"])
def test_real_annotations_are_read_as_they_are(name: str, part: Any) -> None:
    if not (SHARED_DATA / name).is_dir():
        pytest.skip(f"needs shared/data/{name} beside the repository")
    annotation_file, image_folder = coco.layout(SHARED_DATA / name, part)
    split = coco.read(annotation_file, image_folder)
    data = json.loads(annotation_file.read_text())
    assert split.image_ids.tolist() == [image["id"] for image in data["images"]]
    assert len(split.labels) + split.dropped_boxes == len(data["annotations"])
    assert split.crowd.sum() == sum(row["iscrowd"] for row in data["annotations"])
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
    assert (np.diff(split.with_boxes().box_starts) > 0).all()
    assert re.fullmatch(r"S\d+", split.file_names.dtype.str[1:])


def test_the_categories_alone_are_those_of_the_whole_file(tmp_path):
    file = tmp_path / "instances.json"
    content = {"images": [], "annotations": [{}], "categories": [{"id": 7, "name": "b"}, {"id": 2, "name": "a"}]}
    file.write_text(json.dumps(content))
    assert coco.read_categories(file) == (coco.Category(2, "a"), coco.Category(7, "b"))
    file.write_text("{")
    with pytest.raises(InputError, match=f"{file.name}.*broken JSON"):
        coco.read_categories(file)
