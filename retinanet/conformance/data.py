"""Comparisons of the input: resized pixels and boxes, flips, and the boxes that are trained on."""

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from detection.data import coco
from detection.data.image_io import pad_to_batch
from detection.data.image_pipeline import HostImagePipeline
from detection.evaluation.conformance import Comparison, ConformanceContext, max_abs_error
from retinanet.conformance.boxes import compare_sums
from retinanet.conformance.inputs import NUM_CLASSES, reference_config
from retinanet.data import Batch, RetinaNetTrainDataset
from retinanet.resize import normalize_and_resize, resize_boxes
from retinanet.train_images import select_train_images

PIXEL_TOLERANCE, BOX_TOLERANCE_PX = 5e-4, 1e-4


def compare_resizing(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the pixels and boxes of resized images, and those of mirror images that are flipped while resized."""
    size = reference_config().image_size
    flips = torch.tensor([True], device=context.device)
    for case in range(context.scalar("resize_cases")):
        key, name = f"resize{case}", f"resizing {case}"
        height, width = context.vectors[f"{key}_size"].tolist()
        rng = np.random.default_rng(context.scalar(f"{key}_seed"))
        image = torch.from_numpy(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).permute(2, 0, 1)
        border = torch.zeros(3, height + 5, width + 3, dtype=torch.uint8)  # of a larger image in the batch
        image, mirrored, _ = pad_to_batch([image, image.flip(2), border]).to(context.device)[:, None]
        sizes_hw = torch.tensor([[height, width]], device=context.device)
        resized = normalize_and_resize(image, sizes_hw, None, size)[0]
        expected = context.vector(f"{key}_image")
        yield Comparison(f"{name}: pixels", max_abs_error(resized[:, ::37, ::41], expected), PIXEL_TOLERANCE)
        yield from compare_sums(context, f"{key}_image", f"{name}: pixels", resized, PIXEL_TOLERANCE)
        flipped = normalize_and_resize(mirrored, sizes_hw, flips, size)[0]
        yield Comparison(f"{name}: flipped pixels", max_abs_error(flipped[:, ::37, ::41], expected), PIXEL_TOLERANCE)
        boxes = context.vector(f"{key}_boxes_in")[None]
        actual = resize_boxes(boxes, sizes_hw, None, size)[0]
        yield Comparison(f"{name}: boxes", max_abs_error(actual, context.vector(f"{key}_boxes")), BOX_TOLERANCE_PX)
        # The file has the flipped boxes before they are resized.
        expected = resize_boxes(context.vector(f"{key}_boxes_flipped")[None], sizes_hw, None, size)
        yield Comparison(
            f"{name}: flipped boxes", max_abs_error(resize_boxes(boxes, sizes_hw, flips, size), expected), 0
        )


def compare_prepared_boxes(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the boxes and labels that are trained on, from the annotations of an image."""
    width, height = context.vectors["prepare_image_wh"].tolist()
    rows = context.vectors["prepare_annotations"].tolist()
    content = {
        "images": [{"id": 1, "file_name": "1.png", "height": height, "width": width}],
        "annotations": [
            {
                "id": number,
                "image_id": 1,
                "bbox": bbox,
                "area": bbox[2] * bbox[3],
                "category_id": int(category),
                "iscrowd": int(is_crowd),
            }
            for number, (*bbox, category, is_crowd) in enumerate(rows, start=1)
        ],
        "categories": [{"id": category, "name": f"class {category}"} for category in range(NUM_CLASSES - 1)],
    }
    with TemporaryDirectory() as name:
        annotation_file = Path(name) / "annotations.json"
        annotation_file.write_text(json.dumps(content))
        Image.new("RGB", (width, height)).save(annotation_file.with_name("1.png"))
        config = reference_config(
            *("--train-annotations", str(annotation_file), "--train-images", name),
            *("--val-annotations", str(annotation_file), "--val-images", name),
        )
        split = select_train_images(config, coco.open_split(config, "train"))
        batch = RetinaNetTrainDataset(split, seed=0, flip=False, pixels=HostImagePipeline()).__getitems__([(1, 0)])
    if not isinstance(batch, Batch):
        raise batch
    valid = batch.labels > 0
    for part, actual in (("boxes", batch.boxes_xyxy[valid]), ("labels", batch.labels[valid] - 1)):
        yield Comparison(f"prepared {part}", max_abs_error(actual, context.vector(f"prepare_{part}").cpu()), 0)
