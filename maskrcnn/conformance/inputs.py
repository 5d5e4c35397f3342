"""Inputs of the reference's vectors: drawn from the seeds in the file, or built from its arrays.

B images, A anchors, G ground-truth boxes, C channels. The generators are those of tests/golden/maskrcnn/cases.py.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from detection.config.run_config import COCO_NUM_CLASSES
from detection.data import coco
from detection.data.coco import Split
from detection.data.loader import pad
from detection.evaluation.conformance import ConformanceContext
from maskrcnn.anchors import RATIOS, grid_hw
from maskrcnn.config import Config, load

# Largest errors that held between the reference and a float32 program on a CPU: pixels, absolute, relative, relative.
BOX_TOLERANCE, SCORE_TOLERANCE, LOSS_TOLERANCE, GRADIENT_TOLERANCE = 3e-4, 1e-5, 2e-6, 1e-5

Polygons = list[list[float]]


def reference_config(*flags: str) -> Config:
    """Return the settings of the reference. Flags change some of them."""
    return load(["--num-classes", str(COCO_NUM_CLASSES), *flags], {}).config


def padded_hw(context: ConformanceContext) -> tuple[int, int]:
    """Return the padded size of the images of all parts but the network."""
    height, width = context.vectors["anchors_padded_hw"].tolist()
    return height, width


def permutation_priority(seed: int, count: int) -> NDArray[np.float64]:
    """Return the priorities (count,) by which the vectors replace the reference's random draws."""
    return np.random.default_rng(seed).permutation(count) / count


def rpn_outputs(
    context: ConformanceContext, seed: int, delta_scale: float = 1.0, p2_bias: float = 0.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Draw logits (B, 3, h, w) and deltas (B, 12, h, w) of each level."""
    rng, batch = np.random.default_rng(seed), len(context.vectors["anchors_sizes_hw"])
    logits, deltas = [], []
    for level, cells in enumerate(grid_hw(*padded_hw(context))):
        draw = 2 * rng.standard_normal((batch, len(RATIOS), *cells))
        logits.append(context.as_tensor(draw + (0 if level else p2_bias)))
        deltas.append(context.as_tensor(delta_scale * 0.3 * rng.standard_normal((batch, 4 * len(RATIOS), *cells))))
    return logits, deltas


def images_u8(seed: int, sizes_hw: Sequence[tuple[int, int]]) -> list[NDArray[np.uint8]]:
    """Draw images (h, w, 3) uint8 RGB of smooth blobs and noise."""
    rng = np.random.default_rng(seed)
    images = []
    for height, width in sizes_hw:
        coarse = rng.uniform(0, 255, (3, 7, 9))
        y, x = np.linspace(0, 5.999, height), np.linspace(0, 7.999, width)
        row, column = y.astype(int), x.astype(int)
        row_weight, column_weight = (y - row)[:, None], (x - column)[None]
        top, bottom = (
            coarse[:, r][:, :, column] * (1 - column_weight) + coarse[:, r][:, :, column + 1] * column_weight
            for r in (row, row + 1)
        )
        image = top * (1 - row_weight) + bottom * row_weight
        image += rng.normal(0, 12, image.shape)
        images.append(np.clip(np.round(image), 0, 255).astype(np.uint8).transpose(1, 2, 0).copy())
    return images


def read_polygons(context: ConformanceContext, prefix: str) -> list[Polygons]:
    """Return the polygons of each object, from arrays whose keys start with `prefix`."""
    lines, starts, points = (context.vectors[f"{prefix}_{key}"] for key in ("line_starts", "point_starts", "points"))
    rings = [ring.tolist() for ring in np.split(points, starts[1:-1])]
    return [rings[start:stop] for start, stop in pairwise(lines)]


def pad_boxes(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack boxes (G_i, 4) of each image to (B, G, 4), and return which are valid, (B, G)."""
    return pad(rows), pad([torch.ones(len(boxes), dtype=torch.bool, device=boxes.device) for boxes in rows])


def write_split(folder: Path, content: dict[str, Any], pixels: Sequence[NDArray[np.uint8]] = ()) -> Split:
    """Write a data set in COCO's format to an empty folder, and read it; images without `pixels` are black."""
    for number, image in enumerate(content["images"]):
        size_hw = image["height"], image["width"]
        array = pixels[number] if pixels else np.zeros((*size_hw, 3), np.uint8)
        Image.fromarray(array).save(folder / image["file_name"])
    annotation_file = folder / "instances.json"
    annotation_file.write_text(json.dumps(content))
    return coco.read(annotation_file, folder, segmentations=True)


def coco_content(
    sizes_hw: Sequence[tuple[int, int]],
    boxes_xyxy: Sequence[NDArray[np.float32]],
    polygons: Sequence[Sequence[Polygons]],
) -> dict[str, Any]:
    """Return a data set in COCO's format: one object for each legacy box (G, 4) and its polygons, by image."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (height, width) in enumerate(sizes_hw, start=1):
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
        for box, rings in zip(boxes_xyxy[number - 1].astype(np.float64), polygons[number - 1], strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "bbox": [*box[:2].tolist(), *(box[2:] - box[:2] + 1).tolist()],
                    "area": 1,
                    "iscrowd": 0,
                    "segmentation": rings,
                }
            )
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}
