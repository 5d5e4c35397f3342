import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from annotation_file import annotation, content, data_folder, read
from detection.config.settings import InputError
from detection.data import coco, coco_arrays, coco_json
from detection.evaluation.coco_metric import dense_ground_truth


@pytest.fixture
def annotation_file(tmp_path: Path) -> Path:
    """Valid annotations with clipped, empty and crowd boxes, large and negative ids, and any letters in names."""
    data = content()
    data["images"][0]["id"] = 2**53 + 1
    data["images"][1] |= {"id": -7, "file_name": "a\nb é.jpg"}
    data["categories"][0]["name"] = "brosse à dents\udc80"
    for row in data["annotations"]:
        row["image_id"] = 2**53 + 1 if row["image_id"] == 20 else row["image_id"]
    data["annotations"] += [
        annotation(4, image_id=30, bbox=[250.1, 150.2, 70.3, 60.4], area=1 / 3),
        annotation(5, image_id=-7, bbox=[1, 2, 0, 4]),
    ]
    folder = data_folder(tmp_path)
    (folder / "train2017" / "a\nb é.jpg").touch()
    read(folder, data)
    return folder / "annotations" / "instances_train2017.json"


def change_size(file: Path, box: list[float]) -> None:
    """Change a box and keep the modification time."""
    stat = file.stat()
    data = json.loads(file.read_text())
    data["annotations"][0]["bbox"] = box
    file.write_text(json.dumps(data))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def fields(record: Any) -> dict[str, Any]:
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in values.items()}


def forbid_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco_json, "read", lambda *_: pytest.fail("the annotation file was read"))


@pytest.mark.parametrize("torchvision_boxes", [False, True])
def test_split_and_metric_from_arrays_are_those_of_the_annotation_file(
    annotation_file: Path, torchvision_boxes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = annotation_file, annotation_file.parents[1] / "train2017"
    expected = coco.read(*paths, torchvision_boxes=torchvision_boxes)
    expected_gt = dense_ground_truth(expected, segmentations=False)
    assert coco_arrays.main([str(annotation_file)]) == 0
    forbid_json(monkeypatch)
    split = coco.read(*paths, torchvision_boxes=torchvision_boxes)
    assert fields(split) == fields(expected)
    for field in dataclasses.fields(coco.Split):
        assert getattr(getattr(split, field.name), "dtype", None) == getattr(
            getattr(expected, field.name), "dtype", None
        )
    assert dense_ground_truth(split, segmentations=False) == expected_gt
    assert (split.num_dropped_boxes, split.num_clipped_boxes) == (1, 1)


def test_masks_come_from_the_annotation_file(annotation_file: Path) -> None:
    coco_arrays.main([str(annotation_file)])
    assert len(coco_arrays.read(annotation_file, segmentations=True).segmentations) == 5
    assert not coco_arrays.read(annotation_file).segmentations


@pytest.mark.parametrize("change", ["size", "time", "version", "cut", "flipped", "garbage", "empty"])
def test_stale_and_damaged_arrays_are_not_used_until_rebuilt(
    annotation_file: Path, change: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    coco_arrays.main([str(annotation_file)])
    path = coco_arrays.arrays_path(annotation_file)
    arrays, expected = path.read_bytes(), coco_json.read(annotation_file)
    match change:
        case "size":
            change_size(annotation_file, [10, 20, 30.25, 40.125])
            expected = coco_json.read(annotation_file)
        case "time":
            os.utime(annotation_file, ns=(0, annotation_file.stat().st_mtime_ns + 1))
        case "version":
            monkeypatch.setattr(coco_arrays, "FORMAT_VERSION", coco_arrays.FORMAT_VERSION + 1)
        case "cut":
            path.write_bytes(arrays[:-100])
        case "flipped":
            position = arrays.index(expected.boxes_xywh.tobytes())
            path.write_bytes(arrays[:position] + b"\x7f" + arrays[position + 1 :])
        case "garbage":
            path.write_bytes(b"no arrays")
        case "empty":
            path.write_bytes(b"")
    assert not coco_arrays.read(annotation_file).is_valid
    assert fields(coco_arrays.read(annotation_file)) == fields(expected)
    capsys.readouterr()
    assert coco_arrays.main([str(annotation_file)]) == 0
    assert capsys.readouterr().out == f"{path}: 3 images, 5 boxes\n"
    assert fields(coco_arrays.read(annotation_file)) == fields(dataclasses.replace(expected, is_valid=True))
    assert coco_arrays.main([str(annotation_file)]) == 0
    assert capsys.readouterr().out == f"{path} is current\n"


def test_invalid_annotations_get_no_arrays(annotation_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_size(annotation_file, [500, 0, 10, 10])
    assert coco_arrays.main([str(annotation_file)]) == 2
    assert "boxes entirely outside their image: 1 of 5" in capsys.readouterr().err
    assert [path.name for path in annotation_file.parent.iterdir()] == [annotation_file.name]
    assert coco_arrays.main([str(annotation_file.with_name("absent.json"))]) == 2
    assert "absent.json: No such file or directory. " in capsys.readouterr().err


def test_full_disk_is_one_message_and_leaves_no_file(
    annotation_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    assert coco_arrays.main([str(annotation_file)]) == 2
    path = coco_arrays.arrays_path(annotation_file)
    assert capsys.readouterr().err == f"error: {path}: No space left on device. Check its folder and run this again.\n"
    assert [path.name for path in annotation_file.parent.iterdir()] == [annotation_file.name]


def test_arrays_of_a_changed_file_record_its_earlier_state(annotation_file: Path) -> None:
    signature = coco_arrays.read_signature(annotation_file)
    columns = coco_json.read(annotation_file)
    change_size(annotation_file, [10, 20, 30.25, 40.125])
    coco_arrays.write(annotation_file, columns, signature)
    assert coco_arrays.read_arrays(annotation_file) is None


def test_invalid_annotations_without_arrays_are_still_reported(annotation_file: Path) -> None:
    coco_arrays.main([str(annotation_file)])
    change_size(annotation_file, [500, 0, 10, 10])
    with pytest.raises(InputError, match="entirely outside"):
        coco.read(annotation_file, annotation_file.parents[1] / "train2017")
