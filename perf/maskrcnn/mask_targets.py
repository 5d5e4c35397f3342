"""Mask R-CNN's mask targets, compared with those of the MLPerf reference, which draws one region after the other.

Objects are star-shaped polygons of 20 to 100 points, some of 500, and some of several parts, as in COCO.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from pycocotools import mask as mask_api
from torch import Tensor

from maskrcnn import masks
from maskrcnn.data import pad_vertices
from maskrcnn.masks import MASK_SIZE, Floats
from perf.harness import BenchContext, Result
from perf.maskrcnn.training import jitter_boxes
from perf.timing import Variant

REGIONS_PER_IMAGE = 128  # the most that training samples
OBJECTS_PER_IMAGE = 7


def time_mask_targets(context: BenchContext) -> Iterator[Result]:
    """Time Mask R-CNN's mask targets of 128 regions per image against pycocotools, one region at a time."""
    yield from context.compare("maskrcnn_mask_targets", *mask_target_variants(context))


def mask_target_variants(context: BenchContext) -> list[Variant]:
    """Return the rasterization of mask targets. Each variant returns them, (R, 28, 28) float32 on the device."""
    batch_size = context.size.maskrcnn_batch_size
    rng = np.random.default_rng(context.seed)
    torch.manual_seed(context.seed)
    objects = [
        [make_vertices(rng, context.size.maskrcnn_image_px) for _ in range(OBJECTS_PER_IMAGE)]
        for _ in range(batch_size)
    ]
    regions = [
        jitter_boxes(torch.from_numpy(np.stack([bounds(mask) for mask in image])), REGIONS_PER_IMAGE)
        for image in objects
    ]
    image_indices = torch.arange(batch_size, device=context.device).repeat_interleave(REGIONS_PER_IMAGE)
    object_indices = torch.arange(REGIONS_PER_IMAGE, device=context.device).repeat(batch_size) % OBJECTS_PER_IMAGE
    vertices, rois = pad_vertices(objects).to(context.device), torch.cat(regions).to(context.device)

    def run() -> Tensor:
        return masks.rasterize_polygons(vertices[image_indices, object_indices], rois)

    def run_reference() -> Tensor:
        targets = [
            draw_like_reference(image[number % OBJECTS_PER_IMAGE], roi)
            for image, image_rois in zip(objects, rois.cpu().split(REGIONS_PER_IMAGE), strict=True)
            for number, roi in enumerate(image_rois.numpy())
        ]
        return torch.from_numpy(np.stack(targets)).to(context.device, torch.float32)

    title = f"{REGIONS_PER_IMAGE} regions per image, batch {batch_size}"
    return [Variant(f"all at once, {title}", run, batch_size), Variant("pycocotools", run_reference, batch_size)]


def make_vertices(rng: np.random.Generator, image_px: tuple[int, int]) -> Floats:
    """Return a mask anywhere in an image as vertices, as in `masks.mask_vertices`."""
    num_parts = 3 if rng.random() < 0.1 else 1
    parts = []
    for number in range(1, num_parts + 1):
        num_points = 500 if rng.random() < 0.05 else int(rng.integers(20, 101))
        angles = np.sort(rng.uniform(0, 2 * np.pi, num_points))
        points = rng.uniform(0.45, 1, (num_points, 1)) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        closed = np.concatenate([points, points[:1]]) + 1.5 * number
        parts.append(np.column_stack([closed, np.full(len(closed), number)]))
    mask = np.concatenate(parts).astype(np.float32)
    extent = np.exp(rng.uniform(np.log(8), np.log(200), 2))
    mask[:, :2] = mask[:, :2] * extent / num_parts + rng.uniform(0, 1, 2) * np.array(image_px[::-1])
    return mask


def bounds(mask: Floats) -> Floats:
    """Return the box (4,) of a mask."""
    return np.concatenate([mask[:, :2].min(axis=0), mask[:, :2].max(axis=0)])


def draw_like_reference(mask: Floats, roi_xyxy: Floats) -> Floats:
    """Return the target (28, 28) of one region by maskrcnn-benchmark's steps: crop, scale, and draw polygons."""
    scale = np.float32(MASK_SIZE) / np.maximum(roi_xyxy[2:] - roi_xyxy[:2], 1)
    offsets = np.flatnonzero(np.diff(mask[:, 2], prepend=0, append=0))
    on_grid = (mask[:, :2] - roi_xyxy[:2]) * scale
    polygons = [on_grid[start : end - 1].ravel().tolist() for start, end in pairwise(offsets)]
    drawn: Floats = mask_api.decode(mask_api.merge(mask_api.frPyObjects(polygons, MASK_SIZE, MASK_SIZE)))
    return drawn
