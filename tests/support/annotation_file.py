"""Small annotation files and their image folders."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from detection.data import coco


def content() -> dict[str, Any]:
    """Return three images, the second without boxes, and categories with unordered ids and gaps."""
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
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 7, "name": "train"}],
    }


def annotation(number: int, **changes: Any) -> dict[str, Any]:
    row = {"id": number, "image_id": 20, "category_id": 1, "bbox": [5, 5, 10, 10], "area": 100.0, "iscrowd": 0}
    return row | {"segmentation": [[5, 5, 15, 5, 15, 15]]} | changes


def read_one_image(
    folder: Path, segmentations: Sequence[Any], boxes_xywh: Sequence[Sequence[float]], size_hw: Sequence[int]
) -> coco.Split:
    """Write a black image with one annotation per segmentation and box, and read it with its masks."""
    rows = zip(segmentations, boxes_xywh, strict=True)
    data = {
        "images": [{"id": 1, "file_name": "1.png", "height": size_hw[0], "width": size_hw[1]}],
        "annotations": [
            annotation(number, image_id=1, bbox=list(box), segmentation=segmentation)
            for number, (segmentation, box) in enumerate(rows, start=1)
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (folder / "train2017").mkdir()
    Image.new("RGB", (size_hw[1], size_hw[0])).save(folder / "train2017" / "1.png")
    return read(folder, data, segmentations=True)


def read(folder: Path, data: Any, **options: Any) -> coco.Split:
    text = data if isinstance(data, str) else json.dumps(data)
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / "train2017").mkdir(exist_ok=True)
    (folder / "annotations" / "instances_train2017.json").write_text(text)
    return coco.read(*coco.standard_paths(folder, "train"), **options)


def data_folder(folder: Path) -> Path:
    """Write the images of `content`, without annotations, and return their data folder."""
    (folder / "train2017").mkdir()
    for image in content()["images"]:
        (folder / "train2017" / image["file_name"]).write_bytes(b"never decoded")
    return folder


def contents(folder: Path, split: str) -> dict[str, Any]:
    """Read the annotation file of a split in COCO 2017's layout."""
    return json.loads((folder / "annotations" / f"instances_{split}2017.json").read_text())


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
