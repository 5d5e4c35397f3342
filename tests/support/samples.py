"""Splits and detections in a few lines."""

from pathlib import Path

import numpy as np

from detection.data.coco import Category, Split


def make_split(*images: list[tuple[list[float], int, bool]]) -> Split:
    """Return a split of images of 100 × 100 pixels. Each box has corners, a label and a crowd flag."""
    boxes = [box for image in images for box in image]
    return Split(
        annotation_file=Path("a.json"),
        image_dir=Path("images"),
        image_ids=np.arange(10, 10 + len(images)),
        file_names=np.array([f"{n}.jpg" for n in range(len(images))], dtype=np.bytes_),
        sizes_hw=np.full((len(images), 2), 100, dtype=np.int32),
        box_offsets=np.cumsum([0, *map(len, images)]),
        boxes_xyxy=np.array([box[0] for box in boxes], dtype=np.float32).reshape(-1, 4),
        labels=np.array([box[1] for box in boxes], dtype=np.int64),
        is_crowd=np.array([box[2] for box in boxes], dtype=bool),
        categories=(Category(3, "disc"), Category(7, "square")),
        num_dropped_boxes=0,
        num_clipped_boxes=0,
        num_missing_images=0,
    )


def make_detection(image_id: int, corners: list[float], category_id: int, score: float) -> dict[str, object]:
    left, top, right, bottom = corners
    box = [left, top, right - left, bottom - top]
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
