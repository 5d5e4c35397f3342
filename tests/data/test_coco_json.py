import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from annotation_file import content, data_folder, read
from detection.config.settings import InputError
from detection.data import coco, coco_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return data_folder(tmp_path)


def without(table: str, key: str) -> Callable[[dict[str, Any]], None]:
    return lambda data: data[table][1].pop(key)


def with_value(table: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data[table][1].update({key: value})


INVALID_FILES = {
    "nan": (with_value("annotations", "bbox", [0, 0, float("nan"), 1]), r"boxes with NaN or infinity: 1 of 3"),
    "inf": (with_value("annotations", "bbox", [0, float("-inf"), float("inf"), 1]), r"NaN or infinity: 1 of 3"),
    "negative": (with_value("annotations", "bbox", [9, 9, -2, 1]), r"negative width or height: 1 of 3.*annotation 2"),
    "right of the image": (with_value("annotations", "bbox", [100, 0, 5, 5]), r"entirely outside their image: 1 of 3"),
    "above the image": (with_value("annotations", "bbox", [5, -5, 5, 5]), r"entirely outside their image: 1 of 3"),
    "three numbers": (with_value("annotations", "bbox", [5, 5, 5]), r"'bbox' that is not 4 numbers.*annotations\[1\]"),
    "text in a box": (with_value("annotations", "bbox", [5, 5, 5, "5"]), r"'bbox' that is not 4 numbers"),
    "not a list": (with_value("annotations", "bbox", None), r"'bbox' that is not a list"),
    "huge": (with_value("annotations", "bbox", [10**400, 1, 1, 1]), r"'bbox' of more than 64 bits"),
    "unknown category": (with_value("annotations", "category_id", 5), r"unknown category_id: 1 of 3.*category_id 5"),
    "unknown image": (with_value("annotations", "image_id", 11), r"unknown image_id: 1 of 3.*image_id 11"),
    "huge id": (with_value("annotations", "image_id", 2**64), r"'image_id' of more than 64 bits"),
    "float id": (with_value("images", "id", 1.5), r"'id' that is not an integer \(first: images\[1\]\)"),
    "image id twice": (with_value("images", "id", 20), r"images with a duplicate id: 1 of 3 \(first: 20\)"),
    "category id twice": (
        lambda data: data["categories"].append({"id": 90, "name": "again"}),
        r"categories with a duplicate id: 1 of 4 \(first: 90\)",
    ),
    "annotation id twice": (with_value("annotations", "id", 1), r"annotations with a duplicate id: 1 of 3"),
    "no height": (with_value("images", "height", 0), r"outside 1 to 65535: 1 of 3 \(first: image 10, 64×0\)"),
    "name is a number": (with_value("images", "file_name", 7), r"'file_name' that is not text"),
    "no file_name": (without("images", "file_name"), r"1 of 3 images have no 'file_name' \(first: images\[1\]\)"),
    "no bbox": (without("annotations", "bbox"), r"1 of 3 annotations have no 'bbox'"),
    "no name": (without("categories", "name"), r"1 of 3 categories have no 'name'"),
    "no images": (lambda data: data["images"].clear(), r"'images' is empty"),
    "no boxes": (lambda data: data["annotations"].clear(), r"'annotations' is empty"),
    "no categories": (lambda data: data.pop("categories"), r"'categories' is missing"),
    "no table": (lambda data: data.update(images="none"), r"'images' is not a list"),
    "no rows": (lambda data: data["images"].append(3), r"1 of 4 images are not JSON objects"),
    "only empty boxes": (
        lambda data: [row.update(bbox=[1, 1, 0, 0]) for row in data["annotations"]],
        r"nothing to train on",
    ),
}


@pytest.mark.parametrize("error", INVALID_FILES)
def test_invalid_annotations_are_reported_with_their_position(folder: Path, error: str) -> None:
    change, message = INVALID_FILES[error]
    data = content()
    change(data)
    with pytest.raises(InputError, match=message) as raised:
        read(folder, data)
    assert str(raised.value).startswith(str(folder / "annotations" / "instances_train2017.json"))
    assert "\n" not in str(raised.value)


def test_broken_json_is_reported_with_line_and_column(folder: Path) -> None:
    with pytest.raises(InputError, match=r"instances_train2017\.json, line 2, column 10: broken JSON"):
        read(folder, '{"info": {},\n"images" 3}')


@pytest.mark.parametrize("text", ["[1, 2]", "3", "", '{"images": ' + "[" * 100_000, '{"images": ' + "9" * 5000 + "}"])
def test_file_with_other_content_is_an_error(folder: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"broken JSON|not JSON|expected a JSON object"):
        read(folder, text)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_every_unicode_encoding_is_read(folder: Path, encoding: str) -> None:
    data = content()
    data["categories"][0]["name"] = "зубная щётка"
    file = folder / "a.json"
    file.write_bytes(json.dumps(data, ensure_ascii=False).encode(encoding))
    assert coco.read(file, folder / "train2017").categories[2].name == "зубная щётка"
    assert coco.read_categories(file)[2].name == "зубная щётка"


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        ('{"categories": "红"}'.encode("gbk"), "Save it in UTF-8"),
        (b"", "an empty file, not JSON"),
        (b"\n<!DOCTYPE html><html>", "an HTML page, perhaps of a failed download, not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\n", r"Git LFS \(run git lfs pull\), not JSON"),
        (b"PK\x03\x04\xff\xfe\xfd", "an archive, not JSON"),
        (b"\0" * 50, "a file of zeros"),
    ],
)
def test_other_content_is_named(folder: Path, encoded: bytes, message: str) -> None:
    file = folder / "a.json"
    file.write_bytes(encoded)
    for read_file in (lambda: coco.read(file, folder / "train2017"), lambda: coco.read_categories(file)):
        with pytest.raises(InputError, match=message) as caught:
            read_file()
        assert "init_datasets" not in str(caught.value)


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_missing_fields_are_filled_and_reported(folder: Path, count: int, null: bool) -> None:
    data = content()
    for row in data["annotations"][:count]:
        for key in ("id", "area", "iscrowd"):
            row.update({key: None}) if null else row.pop(key)
    split = read(folder, data)
    assert split.remarks == (
        f"{count} of 3 annotations have no 'id': numbered",
        f"{count} of 3 annotations have no 'area': width × height of the box",
        f"{count} of 3 annotations have no 'iscrowd': 0",
    )
    columns = coco_json.read(split.annotation_file)
    assert len(set(columns.annotation_ids.tolist())) == 3
    assert columns.areas.tolist() == [30.5 * 40, 5000 if count == 3 else 100, 12 if count == 3 else 100]
    assert split.is_crowd.tolist() == [False, False, count == 1]
    assert read(folder, content()).remarks == ()


@pytest.mark.parametrize("exif", ["auto", "apply"])
def test_missing_sizes_are_read_from_the_images(folder: Path, exif: Any) -> None:
    data = content()
    orientation = Image.Exif()
    orientation[0x0112] = 6
    Image.new("RGB", (64, 48)).save(folder / "train2017/000000000010.jpg", exif=orientation)
    del data["images"][1]["width"]
    data["images"][2]["height"] = None
    with pytest.raises(InputError, match=r"000000000030\.jpg: this image cannot be read"):
        read(folder, data, exif=exif)
    Image.new("RGB", (300, 200)).save(folder / "train2017/000000000030.jpg")
    split = read(folder, data, exif=exif)
    assert split.sizes_hw.tolist() == [[50, 100], [48, 64] if exif == "auto" else [64, 48], [200, 300]]
    assert split.remarks == ("2 of 3 images have no 'width' or 'height': read from their headers",)


def test_invalid_sizes_cast_no_suspicion_on_the_boxes(folder: Path) -> None:
    data = content()
    for image in data["images"]:
        image |= {"width": -1, "height": -1}
    with pytest.raises(InputError, match="outside 1 to 65535: 3 of 3") as caught:
        read(folder, data)
    assert "beyond their image" not in str(caught.value)


def test_binary_file_is_an_error(folder: Path) -> None:
    file = folder / "binary.json"
    file.write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(InputError, match="broken JSON"):
        coco.read(file, folder / "train2017")
