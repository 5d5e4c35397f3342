"""Checks of generated annotations against pycocotools."""

from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle


def check_polygons(content: dict[str, Any], rel: float) -> None:
    """Check the box and the area (relative tolerance `rel`) of each polygon in an annotation file."""
    images = {image["id"]: image for image in content["images"]}
    for row in content["annotations"]:
        if row["iscrowd"]:
            continue
        (flat,) = row["segmentation"]
        polygon = np.array(flat).reshape(-1, 2)
        lower, upper = polygon.min(axis=0), polygon.max(axis=0)
        assert row["bbox"] == pytest.approx([*lower, *(upper - lower)], abs=0.006)
        image = images[row["image_id"]]
        (encoded,) = rle.frPyObjects([flat], image["height"], image["width"])
        assert row["area"] == pytest.approx(float(rle.area(encoded)), rel=rel, abs=20)


def check_crowd(row: dict[str, Any]) -> None:
    """Check the RLE, the area and the tight box of a crowd."""
    counts, (height, width) = row["segmentation"]["counts"], row["segmentation"]["size"]
    encoded = rle.frPyObjects(row["segmentation"], height, width)
    assert sum(counts) == height * width
    assert all(count > 0 for count in counts[1:])
    assert row["area"] == rle.area(encoded)
    assert row["bbox"] == rle.toBbox(encoded).tolist()
