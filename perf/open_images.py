"""Generated annotations of Open Images, and the conversion and readers whose cost `perf.cost_curves` measures.

A generated split has 12 boxes per image, all of MLPerf's classes: 14 million at the 1,170,301 images of its training
split, as many as the whole of Open Images has.
"""

import os
from pathlib import Path

import numpy as np

from detection.data import coco, coco_arrays
from detection.data import open_images_labels as labels
from detection.data.open_images import ANNOTATION_FILE, IMAGE_DIR
from detection.data.open_images_download import CLASSES_FILE, SOURCES, read_names

TRAIN_IMAGES = SOURCES["train"].num_images
BOXES_PER_IMAGE = 12
SIZE_WH = (1024, 683)  # the most frequent size
MAX_LINKS = 30_000  # of a file, which file systems limit


def generate(split: Path, images: int) -> None:
    """Write a split of N images, with empty files, and its boxes as CSV files of Open Images."""
    image_dir = split / IMAGE_DIR
    image_dir.mkdir(parents=True)
    names = read_names(CLASSES_FILE)
    with (split / "classes.csv").open("w") as file:
        file.writelines(f'/m/{i:05},"{name}"\n' for i, name in enumerate(names))
    rng = np.random.default_rng(0)
    columns = (labels.ID_COLUMN, "Source", labels.LABEL_COLUMN, "Confidence", *labels.EDGE_COLUMNS, *labels.FLAGS)
    with (split / "boxes.csv").open("w") as file:
        file.write(",".join(columns) + "\n")
        for image in range(images):
            link_image(image_dir, image)
            low = rng.uniform(0, 0.7, (BOXES_PER_IMAGE, 2))
            high = low + rng.uniform(0.01, 0.3, low.shape)
            classes = rng.integers(0, len(names), BOXES_PER_IMAGE).tolist()
            flags = rng.integers(0, 2, (BOXES_PER_IMAGE, len(labels.FLAGS))).tolist()
            for i, (x, y), (right, bottom), values in zip(classes, low.tolist(), high.tolist(), flags, strict=True):
                edges = f"{x:.6f},{right:.6f},{y:.6f},{bottom:.6f}"
                file.write(f"{labels.format_id(image)},xclick,/m/{i:05},1,{edges},{','.join(map(str, values))}\n")


def link_image(image_dir: Path, image: int) -> None:
    """Create an empty image file, most of them as links."""
    path = image_dir / f"{labels.format_id(image)}.jpg"
    first = image - image % MAX_LINKS
    if first == image:
        path.touch()
    else:
        os.link(image_dir / f"{labels.format_id(first)}.jpg", path)


def convert(split: Path) -> None:
    """Convert the boxes of a split to a JSON file and arrays, as the download does after the last image."""
    names, annotation_file = read_names(CLASSES_FILE), split / ANNOTATION_FILE
    boxes = labels.read_boxes(split / "boxes.csv", labels.read_category_ids(split / "classes.csv", names))
    image_ids = np.unique(boxes.image_ids)
    columns = labels.make_columns(names, image_ids, np.tile(SIZE_WH, (len(image_ids), 1)), boxes)
    labels.write_coco(annotation_file, {}, columns, boxes.flags)
    coco_arrays.write(annotation_file, columns, coco_arrays.read_signature(annotation_file))


def read_json(split: Path) -> None:
    """Read a split from its JSON file."""
    arrays_file = coco_arrays.arrays_path(split / ANNOTATION_FILE)
    hidden = arrays_file.rename(split / "hidden")
    try:
        read_arrays(split)
    finally:
        hidden.rename(arrays_file)


def read_arrays(split: Path) -> None:
    """Read a split from its arrays."""
    coco.read(split / ANNOTATION_FILE, split / IMAGE_DIR, torchvision_boxes=True)
