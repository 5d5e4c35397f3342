"""Tests of prepare-json.py as a command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paths import ROOT

SCRIPT = ROOT / "prepare-json.py"

ANNOTATIONS: dict[str, Any] = {
    "info": {"description": "synthetic"},
    "licenses": [{"id": 1, "name": "none"}],
    "images": [
        {"id": 7, "file_name": "000000000007.jpg", "width": 640, "height": 480, "flickr_url": "http://…"},
        {"id": 9, "file_name": "000000000009.jpg", "width": 320, "height": 240, "flickr_url": "http://…"},
    ],
    "annotations": [
        {
            "id": 1,
            "image_id": 7,
            "category_id": 3,
            "bbox": [10.5, 20, 30, 40.25],
            "area": 702.1,
            "iscrowd": 0,
            "segmentation": [[10, 20, 40, 20, 40, 60]],
            "note": "é",
        },
        {
            "id": 2,
            "image_id": 9,
            "category_id": 3,
            "bbox": [0, 0, 8, 8],
            "area": 31.0,
            "iscrowd": 1,
            "segmentation": {"counts": [3, 61], "size": [8, 8]},
            "note": "",
        },
    ],
    "categories": [{"id": 3, "name": "car", "supercategory": "vehicle", "keypoints": []}],
}


def prepare(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def full(tmp_path: Path) -> Path:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(ANNOTATIONS), encoding="utf-8")
    return path


def reduce(full: Path, *flags: str) -> dict[str, Any]:
    output = full.with_name("bbox_only.json")
    result = prepare(full, output, *flags)
    assert result.returncode == 0, result.stderr
    data: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return data


def test_areas_crowds_boxes_and_ids_are_unchanged(full: Path) -> None:
    kept = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    expected = [{key: box[key] for key in kept} for box in ANNOTATIONS["annotations"]]
    assert reduce(full)["annotations"] == expected


def test_images_and_categories_lose_only_unused_keys(full: Path) -> None:
    data = reduce(full)
    assert data["images"][1] == {"id": 9, "file_name": "000000000009.jpg", "width": 320, "height": 240}
    assert data["categories"] == [{"id": 3, "name": "car", "supercategory": "vehicle"}]


def test_info_and_licenses_are_kept(full: Path) -> None:
    data = reduce(full)
    assert (data["info"], data["licenses"]) == (ANNOTATIONS["info"], ANNOTATIONS["licenses"])


def test_keep_keys_drops_only_the_segmentations(full: Path) -> None:
    data = reduce(full, "-k")
    assert data["images"] == ANNOTATIONS["images"]
    assert data["annotations"][0]["note"] == "é"
    assert all("segmentation" not in box for box in data["annotations"])


def test_pretty_print_changes_only_the_layout(full: Path) -> None:
    compact = reduce(full)
    size = full.with_name("bbox_only.json").stat().st_size
    assert reduce(full, "-p") == compact
    assert full.with_name("bbox_only.json").stat().st_size > size


def test_numbers_of_images_and_boxes_are_printed(full: Path) -> None:
    output = full.with_name("out.json")
    assert f"{output}: 2 images, 2 boxes" in prepare(full, output).stdout


def test_output_can_replace_the_input(full: Path) -> None:
    assert prepare(full, full).returncode == 0
    assert "segmentation" not in full.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', "line 1, column 13"),
        ("[]", "no list 'images': not a COCO annotation file"),
        ('{"images": [], "annotations": {}}', "no list 'annotations'"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "images[0] has no 'file_name'"),
        ('{"images": [3], "annotations": [], "categories": []}', "images[0] has no 'id'"),
    ],
)
def test_invalid_file_is_reported_with_the_position(tmp_path: Path, text: str, message: str) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text(text, encoding="utf-8")
    result = prepare(broken, tmp_path / "out.json")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {broken}: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out.json").exists()


def test_binary_file_is_an_error(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_bytes(b'{"images": "\xff"}')
    result = prepare(broken, tmp_path / "out.json")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)


def test_missing_input_is_an_error(tmp_path: Path) -> None:
    result = prepare(tmp_path / "absent.json", tmp_path / "out.json")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {tmp_path / 'absent.json'}: No such file or directory\n"


def test_missing_output_folder_is_an_error(full: Path, tmp_path: Path) -> None:
    result = prepare(full, tmp_path / "absent" / "out.json")
    assert result.returncode == 2
    assert "cannot be written: No such file or directory" in result.stderr


def test_full_disk_leaves_no_partial_file(full: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    command = f'trap "" XFSZ; ulimit -f 0; exec "{sys.executable}" "{SCRIPT}" "{full}" "{output}" 2>&1 | cat'
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "cannot be written: File too large" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["instances.json"]
