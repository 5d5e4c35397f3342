"""Comparisons of the input: resizing, flips, normalization, groups by aspect ratio, the images to train on."""

import json
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from detection.data.coco import Split
from detection.data.device_cache import DeviceImageCache
from detection.data.image_pipeline import HostImagePipeline, ImagePipeline
from detection.evaluation.conformance import Comparison, ConformanceContext, max_abs_error
from maskrcnn.backbone import normalize
from maskrcnn.conformance.inputs import (
    BOX_TOLERANCE,
    coco_content,
    images_u8,
    read_polygons,
    reference_config,
    write_split,
)
from maskrcnn.data import Batch, MaskRCNNTrainDataset, aspect_groups, resized_hw
from maskrcnn.train_images import select_train_images

PIXEL_TOLERANCE = 1  # Pillow rounds after each of its two passes


def compare_resizing(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the size of resized images, except where the reference leaves no pixel and stops."""
    config, expected = reference_config(), context.vectors["resize_out_hw"]
    is_valid = (expected > 0).all(axis=1)
    sizes = [
        resized_hw((height, width), config.min_image_size, config.max_image_size)
        for width, height in context.vectors["resize_wh"][is_valid].tolist()
    ]
    yield Comparison("resizing", max_abs_error(torch.tensor(sizes), torch.from_numpy(expected[is_valid])), 0)


def make_dataset(split: Split, pixels: ImagePipeline, min_size_px: int, max_size_px: int) -> MaskRCNNTrainDataset:
    """Build the training data set with the reference's settings."""
    return MaskRCNNTrainDataset(
        split, seed=0, min_size_px=min_size_px, max_size_px=max_size_px, flip=True, legacy=True, pixels=pixels
    )


def load_batch(dataset: MaskRCNNTrainDataset, images: Sequence[int], *, flipped: bool) -> Batch:
    """Load one batch of these images from epochs in which all of them are flipped, or none."""
    keys = [
        (next(epoch for epoch in count(1) if dataset.sample_params(epoch, image)[0] == flipped), image)
        for image in images
    ]
    batch = dataset.__getitems__(keys)
    if not isinstance(batch, Batch):
        raise batch
    return batch


def compare_transforms(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the pixels, boxes and polygons of training images, and their mirror images."""
    images = range(context.scalar("transform_cases"))
    sizes_hw = [tuple(context.vectors[f"transform{image}_hw"].tolist()) for image in images]
    boxes = [context.vectors[f"transform{image}_truth_xyxy"] for image in images]
    polygons = [read_polygons(context, f"transform{image}") for image in images]
    limits = context.vectors["transform_min_max"].tolist()
    with TemporaryDirectory() as name:
        pixels = images_u8(context.scalar("transform_images_seed"), sizes_hw)
        split = write_split(Path(name), coco_content(sizes_hw, boxes, polygons), pixels)
        cache = DeviceImageCache(
            split.sizes_hw, 0, split.image_path, context.device, device_decodes=False, compiled=False
        )
        host, device = (make_dataset(split, pipeline, *limits) for pipeline in (HostImagePipeline(), cache.pipeline))
        batches = [load_batch(host, images, flipped=flipped) for flipped in (False, True)]
        on_device = [
            cache.assemble_batch(load_batch(device, images, flipped=flipped).images) for flipped in (False, True)
        ]
    normalized = normalize(
        batches[0].images.to(context.device), batches[0].sizes_hw.to(context.device), reference_config().input_format
    )
    for image in images:
        key, name = f"transform{image}", f"transform {image}"
        size_hw = batches[0].sizes_hw[image]
        yield Comparison(f"{name}: size", max_abs_error(size_hw, context.vector(f"{key}_resized_hw").cpu()), 0)
        for source, (unflipped, flipped) in (("host", [batch.images for batch in batches]), ("device", on_device)):
            errors = [
                max_abs_error(crop(part[image], size_hw)[:, ::row, ::column].permute(1, 2, 0), context.vector(expected))
                for part, row, column, expected in (
                    (unflipped, 3, 2, f"{key}_pixels"),
                    (flipped, 7, 6, f"{key}_flipped_pixels"),
                )
            ]
            yield Comparison(f"{name}: pixels, {source}", errors[0], PIXEL_TOLERANCE)
            yield Comparison(f"{name}: flipped pixels, {source}", errors[1], PIXEL_TOLERANCE)
        expected = context.vector(f"{key}_normalised")
        error = max_abs_error(crop(normalized[image], size_hw)[:, ::5, ::5], expected)
        yield Comparison(f"{name}: normalized", error, PIXEL_TOLERANCE + 1e-4)
        for flip, batch in enumerate(batches):
            actual = batch.boxes_xyxy[image, batch.labels[image] > 0]
            error = max_abs_error(actual, context.vector(f"{key}_flip{flip}_xyxy").cpu())
            yield Comparison(f"{name}: boxes, flip {flip}", error, BOX_TOLERANCE)
            error = max_abs_error(list_points(batch.vertices[image]), context.vector(f"{key}_flip{flip}_points").cpu())
            yield Comparison(f"{name}: polygons, flip {flip}", error, 0)


def crop(image: Tensor, size_hw: Tensor) -> Tensor:
    """Remove the padding of an image (C, H, W)."""
    height, width = size_hw.tolist()
    return image[:, :height, :width]


def list_points(vertices: Tensor) -> Tensor:
    """Return the points x, y, x, y of all polygons, (P,), in the order of vertices (G, V, 3), as in `Batch`."""
    polygons = [
        mask[mask[:, 2] == number][:-1, :2].flatten()  # ends with the first point
        for mask in vertices
        for number in range(1, int(mask[:, 2].max()) + 1)
    ]
    return torch.cat(polygons)


def compare_aspect_groups(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare which images are batched together. The numbers of the two groups are arbitrary."""
    groups = torch.from_numpy(aspect_groups(context.vectors["aspect_hw"]))
    expected = context.vector("aspect_group").cpu()
    yield Comparison("aspect groups", min(max_abs_error(groups, expected), max_abs_error(1 - groups, expected)), 0)


def compare_dataset(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the images that are trained on, and their boxes and labels before the resize."""
    content: dict[str, Any] = json.loads(str(context.vectors["dataset_json"]))
    with TemporaryDirectory() as name:
        split = select_train_images(reference_config(), write_split(Path(name), content))
        ids = split.image_ids.tolist()
        yield Comparison("data set: images", max_abs_error(torch.tensor(ids), context.vector("dataset_ids").cpu()), 0)
        for index, image_id in enumerate(ids):
            if f"dataset_image{image_id}_xyxy" not in context.vectors:
                continue  # an image too many, as the comparison above says
            # At its own size, so that nothing is resized.
            dataset = make_dataset(split, HostImagePipeline(), *sorted(split.sizes_hw[index].tolist()))
            batch = load_batch(dataset, [index], flipped=False)
            valid = batch.labels[0] > 0
            for part, rows, tolerance in (("xyxy", batch.boxes_xyxy, 1e-5), ("labels", batch.labels, 0)):
                error = max_abs_error(rows[0, valid], context.vector(f"dataset_image{image_id}_{part}").cpu())
                yield Comparison(f"data set: image {image_id}, {part}", error, tolerance)
