"""Sample detections of a run for its report, and its confusion matrix.

    python -m detection.evaluation.sample_predictions RUN_FOLDER

Selects up to a dozen evaluation images: the best, typical ones, large missed objects, and confident false positives.
Writes them to pictures/ in the run folder, their boxes and masks to pictures.json, and the confusion matrix of all
images to confusion.json. Reads the data, the run's config.json, and detections.json or, with masks, bbox.json and
segm.json. Objects are matched by box. Needs neither the network nor torch, so it takes seconds.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detection import run_dir
from detection.config.settings import InputError, report_errors
from detection.data import coco, pillow_io, rle
from detection.data.coco import Split
from detection.data.rle import CocoRle
from detection.evaluation.confusion import count_confusions
from detection.evaluation.matching import ImageMatches, match_images, pick_threshold
from mlperf import stdio

IMAGES_PER_GROUP = 3
SIDE_PX = 800  # longer side at most
MASK_SIDE_PX = 200  # longer side of the grid that masks are rounded to
JPEG_QUALITY = 80


def write_samples(run_folder: Path) -> int:
    """Write the files of a run's images. Return the number of images. Raise InputError if a file is missing."""
    config = read_json(run_folder / run_dir.CONFIG)
    has_masks = (run_folder / "segm.json").is_file()
    detections = read_results_with_masks(run_folder) if has_masks else read_json(run_folder / "detections.json")
    annotation_file = config.get("val_annotations")
    paths = (
        (Path(annotation_file), Path(config["val_images"]))
        if annotation_file
        else coco.standard_paths(Path(config["data_dir"]), "val")
    )
    # The run has read the boxes, whether or not those outside of their images are an error for its workload.
    split = coco.read(
        *paths,
        skip_missing_images=config["skip_missing_images"],
        segmentations=has_masks,
        torchvision_boxes=True,
        exif=config.get("exif", "auto"),
    )
    (run_folder / "confusion.json").write_text(json.dumps(count_confusions(split, detections), ensure_ascii=False))
    min_score = pick_threshold(split, detections)
    output = run_folder / "pictures"
    output.mkdir(exist_ok=True)
    for old in output.glob("*.jpg"):
        old.unlink()
    rows: list[dict[str, object]] = []
    for group, matches in select_images(list(match_images(split, detections, min_score))):
        name = f"{len(rows):02d}_{split.image_ids[matches.index]}.jpg"
        image = Image.fromarray(pillow_io.read_pixels(split.image_file(matches.index)))
        scale = min(1.0, SIDE_PX / max(image.size))
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image.resize(size, reducing_gap=2.0).save(output / name, quality=JPEG_QUALITY)
        caption = f"{matches.caption} (score ≥ {min_score:.2f})"
        boxes = describe_boxes(split, matches, scale)
        rows.append({"file": name, "group": group, "caption": caption, "width": size[0], "height": size[1], **boxes})
    (run_folder / "pictures.json").write_text(json.dumps(rows, ensure_ascii=False))
    return len(rows)


def read_json(path: Path) -> Any:
    """Return the content of a file of the run. Raise InputError if it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}). Name the folder of a run that was evaluated.") from error


def read_results_with_masks(run_folder: Path) -> list[dict[str, Any]]:
    """Return the detections of a run with their masks. Raise InputError if the two files do not match."""
    boxes, masks = read_json(run_folder / "bbox.json"), read_json(run_folder / "segm.json")
    if len(boxes) != len(masks):
        raise InputError(
            f"{run_folder}: bbox.json has {len(boxes)} detections and segm.json {len(masks)}, but a run writes as many "
            "of both. Evaluate its checkpoint again."
        )
    return [box | {"segmentation": mask["segmentation"]} for box, mask in zip(boxes, masks, strict=True)]


def select_images(images: Sequence[ImageMatches]) -> Iterator[tuple[str, ImageMatches]]:
    """Yield a few images of each group, none of them twice."""
    selected: set[int] = set()
    f1_scores = sorted(image.f1 for image in images if image.is_object.any())
    median = f1_scores[len(f1_scores) // 2] if f1_scores else 0.0
    # Name, sort key, and condition of each group.
    groups: list[tuple[str, Callable[[ImageMatches], Any], Callable[[ImageMatches], Any]]] = [
        ("missed", lambda image: -image.largest_missed_px, lambda image: image.largest_missed_px > 0),
        (
            "false",
            lambda image: -image.scores[image.is_false_positive].max(initial=0.0),
            lambda image: image.is_false_positive.any(),
        ),
        ("best", lambda image: (-image.f1, -image.is_object.sum()), lambda image: image.is_matched.any()),
        ("typical", lambda image: abs(image.f1 - median), lambda image: image.is_object.any()),
    ]
    for name, sort_key, belongs in groups:
        candidates = [image for image in images if image.index not in selected and belongs(image)]
        for image in sorted(candidates, key=lambda image: (sort_key(image), image.index))[:IMAGES_PER_GROUP]:
            selected.add(image.index)
            yield name, image


def describe_boxes(split: Split, matches: ImageMatches, scale: float) -> dict[str, list[dict[str, object]]]:
    """Return the objects and the detections of an image, scaled to its picture, as pictures.json has them."""
    names = ["?", *(category.name for category in split.categories)]
    gt_masks = split.masks(matches.index) if split.polygons else [None] * len(matches.is_matched)
    found = np.where(matches.is_matched, "found", np.where(matches.is_object, "missed", "crowd"))
    objects = [
        {"name": names[label], "state": state, **describe_shape(box, mask, scale)}
        for box, label, state, mask in zip(
            split.boxes(matches.index).tolist(),
            split.image_labels(matches.index).tolist(),
            found.tolist(),
            gt_masks,
            strict=True,
        )
    ]
    detections = [
        {"name": names[label], "state": "false" if is_false else "correct", "score": round(score, 3)}
        | describe_shape(box, mask, scale)
        for box, label, score, is_false, mask in zip(
            matches.boxes_xyxy.tolist(),
            matches.labels.tolist(),
            matches.scores.tolist(),
            matches.is_false_positive.tolist(),
            matches.masks,
            strict=True,
        )
    ]
    return {"objects": objects, "detections": detections}


def describe_shape(box_xyxy: Sequence[float], mask: CocoRle | None, scale: float) -> dict[str, object]:
    """Return left, top, width and height of a box, and the outline of its mask as an SVG path, if it has one."""
    left, top, right, bottom = (side * scale for side in box_xyxy)
    shape: dict[str, object] = {"box": [round(side, 1) for side in (left, top, right - left, bottom - top)]}
    return shape if mask is None else shape | {"mask": outline_mask(mask, scale)}


def outline_mask(mask: CocoRle, scale: float) -> str:
    """Return the outline of a mask, whose coordinates are multiplied by `scale`, as an SVG path."""
    pixels = rle.decode_mask(mask)
    stride = max(1, -(-max(pixels.shape) // MASK_SIDE_PX))
    grid = pixels[stride // 2 :: stride, stride // 2 :: stride]
    flat = np.concatenate([[0], grid.ravel(order="F"), [0]])
    runs = np.flatnonzero(np.diff(flat.astype(np.int8))).reshape(-1, 2)
    points = [(f"{x:.0f}", f"{y:.0f}") for x, y in (rle.runs_to_polygon(runs, len(grid)) * stride * scale).tolist()]
    if not points:
        return ""
    sides = (f"H{x}" if y == y0 else f"V{y}" for (_, y0), (x, y) in itertools.pairwise(points))
    return "M{} {}".format(*points[0]) + "".join(sides) + "Z"


@report_errors
def main(argv: list[str]) -> int:
    """Draw images of the given run. Return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m detection.evaluation.sample_predictions", description="Select images of a run for its report."
    )
    parser.add_argument("run", type=Path, help="folder of a run that was evaluated")
    print(f"{write_samples(parser.parse_args(argv).run)} images")
    return 0


if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(main(sys.argv[1:]))
