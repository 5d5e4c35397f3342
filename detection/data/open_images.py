"""Open Images v6 in the layout of MLPerf's RetinaNet, which its download by fiftyone 0.15.1 has."""

from pathlib import Path
from typing import Literal

from detection.config.settings import InputError

FOLDERS = {"train": "train", "val": "validation"}
ANNOTATION_FILE, IMAGE_DIR = "labels/openimages-mlperf.json", "data"  # in the folder of a split


def paths(data_dir: Path, split: Literal["train", "val"]) -> tuple[Path, Path]:
    """Return the annotation file and image folder of a split. Raise InputError if one of them is missing."""
    folder = data_dir / FOLDERS[split]
    annotation_file, image_dir = folder / ANNOTATION_FILE, folder / IMAGE_DIR
    for path in (annotation_file, image_dir):
        if not path.exists():
            raise InputError(
                f"DATADIR={data_dir}: {path.relative_to(data_dir)} is missing. Set DATADIR to a folder that contains "
                f"{folder.name}/{ANNOTATION_FILE} and {folder.name}/{IMAGE_DIR}/."
            )
    return annotation_file, image_dir
