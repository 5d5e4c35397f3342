"""Photos that the benchmarks use: a folder of real ones, or synthetic ones with COCO's sizes and file lengths.

A data set of any size is made from a few photos: the same files under many names, with the boxes of each.
"""

import json
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from PIL import Image

from detection.config.settings import InputError
from detection.data import coco
from detection.synthetic import coco_sized


@dataclass(frozen=True)
class Photo:
    """A file, its size in pixels, and its boxes as COCO annotations without ids."""

    path: Path
    width: int
    height: int
    boxes: list[dict[str, Any]]

    def with_boxes_of(self, other: "Photo") -> "Photo":
        """Return this photo with the boxes of another, stretched to its size."""
        scale_x, scale_y = self.width / other.width, self.height / other.height
        boxes = []
        for box in other.boxes:
            left, top, width, height = box["bbox"]
            stretched = [left * scale_x, top * scale_y, width * scale_x, height * scale_y]
            boxes.append(box | {"bbox": stretched, "area": stretched[2] * stretched[3]})
        return replace(self, boxes=boxes)


@dataclass(frozen=True)
class PhotoSet:
    """Photos with boxes. name: shown in tables. categories: as in COCO's files."""

    name: str
    photos: list[Photo]
    categories: list[dict[str, Any]]

    @property
    def num_classes(self) -> int:
        """Number of categories, plus one for the background."""
        return 1 + len(self.categories)

    def encoded(self) -> list[bytes]:
        """Return the bytes of each file."""
        return [photo.path.read_bytes() for photo in self.photos]

    def with_boxes_of(self, others: "PhotoSet") -> "PhotoSet":
        """Return these photos. If they have no categories, take the boxes of `others`, stretched to their sizes."""
        if self.categories:
            return self
        pairs = zip(self.photos, cycle(others.photos), strict=False)
        return replace(
            self, photos=[photo.with_boxes_of(other) for photo, other in pairs], categories=others.categories
        )

    def make_data_dir(self, folder: Path, train_images: int, val_images: int) -> Path:
        """Make a data set in COCO's layout in a new folder. Photos repeat once all were used."""
        for split, count in (("train", train_images), ("val", val_images)):
            image_folder = folder / f"{split}2017"
            image_folder.mkdir(parents=True)
            content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": self.categories}
            for image_id in range(1, count + 1):
                photo = self.photos[(image_id - 1) % len(self.photos)]
                name = f"{image_id:012}.jpg"
                (image_folder / name).symlink_to(photo.path.resolve())
                size = {"width": photo.width, "height": photo.height}
                content["images"].append({"id": image_id, "file_name": name, **size})
                last_id = len(content["annotations"])
                content["annotations"] += [
                    {"id": last_id + i, "image_id": image_id, **box} for i, box in enumerate(photo.boxes, 1)
                ]
            annotation_file = folder / "annotations" / f"instances_{split}2017.json"
            annotation_file.parent.mkdir(exist_ok=True)
            annotation_file.write_text(json.dumps(content))
        return folder


def synthesize_photos(folder: Path, count: int, seed: int) -> PhotoSet:
    """Draw photos with COCO's sizes, file lengths and boxes into a new folder."""
    coco_sized.generate(folder, coco_sized.CocoSizedSpec(train_images=count, seed=seed))
    return read_data_dir(folder, "synthetic", count)


def synthesize_gt(folder: Path, count: int, seed: int, *, segmentations: bool = False) -> coco.Split:
    """Make ground truth with COCO's boxes in a new folder, with empty image files. segmentations: add polygons."""
    coco_sized.generate(folder, coco_sized.CocoSizedSpec(train_images=count, seed=seed), with_images=False)
    annotation_file, image_folder = coco.standard_paths(folder, "train")
    for image in json.loads(annotation_file.read_text())["images"]:
        (image_folder / image["file_name"]).touch()
    return coco.read(annotation_file, image_folder, segmentations=segmentations)


def open_photos(folder: Path, limit: int) -> PhotoSet:
    """Return up to `limit` photos of a folder: in COCO's layout, or JPEG files, which have no boxes.

    Raise InputError if there are none.
    """
    if (folder / "annotations").is_dir():
        return read_data_dir(folder, "photos", limit)
    if not folder.is_dir():
        raise InputError(f"--photos {folder}: no such folder.")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise InputError(f"--photos {folder}: no .jpg file and no annotations/ in it. Name a folder of photos.")
    photos = []
    for path in paths[:limit]:
        try:
            with Image.open(path) as image:
                photos.append(Photo(path, *image.size, boxes=[]))
        except OSError as error:
            raise InputError(f"--photos {folder}: {path.name} is not an image. Remove it.") from error
    return PhotoSet("photos", photos, categories=[])


def read_data_dir(folder: Path, name: str, limit: int) -> PhotoSet:
    """Return up to `limit` photos with boxes from the training split of a data set in COCO's layout."""
    split = coco.read(*coco.standard_paths(folder, "train"), skip_missing_images=True).drop_empty_images()
    photos = []
    for index in range(min(limit, len(split))):
        height, width = split.sizes_hw[index].tolist()
        boxes = [
            {
                "category_id": split.categories[label - 1].id,
                "bbox": [left, top, right - left, bottom - top],
                "area": (right - left) * (bottom - top),
                "iscrowd": 0,
            }
            for label, (left, top, right, bottom) in zip(
                split.image_labels(index).tolist(), split.boxes(index).tolist(), strict=True
            )
        ]
        photos.append(Photo(split.image_path(index), width, height, boxes))
    return PhotoSet(name, photos, [{"id": category.id, "name": category.name} for category in split.categories])
