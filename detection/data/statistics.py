"""Statistics of a data set: what a look at a few images does not show."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detection.data.coco import Split

SIZE_EDGES_PX = (0, 8, 16, 32, 64, 96, 128, 256, 512)
ASPECT_EDGES = (0, 1 / 4, 1 / 2, 2 / 3, 1, 3 / 2, 2, 4)
COUNT_EDGES = (0, 1, 2, 3, 5, 9, 17, 33, 65)
SIDE_EDGES_PX = (0, 150, 300, 450, 600, 800, 1000, 1500, 2000)


@dataclass(frozen=True)
class Histogram:
    """Counts by class or by range. rows: (name, count)."""

    title: str
    rows: list[tuple[str, int]]


def summarize(split: Split) -> list[tuple[str, str]]:
    """Return the counts of a split by name."""
    objects = split.labels[~split.is_crowd]
    unused = sum(label not in objects for label in range(1, len(split.categories) + 1))
    counts = {
        "images": len(split),
        "images without boxes": int((~split.has_boxes).sum()),
        "objects": len(objects),
        "crowds": int(split.is_crowd.sum()),
        "classes": len(split.categories),
        "classes without objects": unused,
        "boxes dropped: no width or height": split.num_dropped_boxes,
        "boxes clipped to their image": split.num_clipped_boxes,
        "images without a file": split.num_missing_images,
    }
    return [(name, f"{count:,}") for name, count in counts.items()]


def histograms(split: Split) -> list[Histogram]:
    """Return the distributions of a split: classes, boxes and images."""
    is_object = ~split.is_crowd
    sides = (split.boxes_xyxy[:, 2:] - split.boxes_xyxy[:, :2])[is_object]
    class_counts = np.bincount(split.labels[is_object], minlength=len(split.categories) + 1)[1:]
    order = np.argsort(-class_counts, kind="stable")
    sizes_hw = split.sizes_hw.astype(np.float64)
    return [
        Histogram("Objects by class", [(split.categories[i].name, int(class_counts[i])) for i in order]),
        count_by_range("Box size, square root of the area in pixels", np.sqrt(sides.prod(axis=1)), SIZE_EDGES_PX),
        count_by_range("Box width over height", sides[:, 0] / sides[:, 1], ASPECT_EDGES),
        count_by_range("Boxes per image", np.diff(split.box_offsets), COUNT_EDGES),
        count_by_range("Longer side of the image in pixels", sizes_hw.max(axis=1), SIDE_EDGES_PX),
        count_by_range("Image width over height", sizes_hw[:, 1] / sizes_hw[:, 0], ASPECT_EDGES),
    ]


def count_by_range(title: str, values: NDArray[Any], edges: Sequence[float]) -> Histogram:
    """Count values by range. edges: the lower ends of the ranges, the first of which is below all values."""
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)[1:]
    names = [f"{round(low, 3):g} to {round(high, 3):g}" for low, high in itertools.pairwise(edges)]
    return Histogram(title, list(zip([*names, f"{edges[-1]:g} and more"], counts.tolist(), strict=True)))
