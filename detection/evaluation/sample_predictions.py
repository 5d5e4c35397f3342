"""Sample detections of a run, drawn next to the ground truth.

    python -m detection.evaluation.sample_predictions RUN_FOLDER

Selects up to a dozen evaluation images: the best, typical ones, large missed objects, and confident false positives.
Writes them to pictures/ in the run folder, with captions in pictures.json. Reads the data, the run's config.json, and
detections.json or, with masks, bbox.json and segm.json. Objects are matched by box. Needs neither the network nor
torch, so it takes seconds.

N images, G ground-truth boxes, D detections of one image.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detection import run_dir
from detection.config.settings import InputError, report_errors
from detection.data import coco
from detection.data.rle import CocoRle
from detection.evaluation import visualize
from detection.evaluation.visualize import Annotation
from mlperf import stdio

IMAGES_PER_GROUP = 3
MATCH_IOU = 0.5
SIDE_PX = 480  # longer side of each half
GAP_PX = 6
JPEG_QUALITY = 80


@dataclass(frozen=True)
class ImageMatches:
    """Detections of one image, matched to its ground truth.

    boxes_xyxy: (D, 4) pixels, with scores (D,), labels (D,) and D masks or None, by descending score.
    is_matched: (G,) whether a detection matches the object. is_false_positive: (D,) whether the detection matches
    nothing. is_object: (G,) all but crowds.
    """

    index: int
    boxes_xyxy: NDArray[np.float64]
    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    masks: Sequence[CocoRle | None]
    is_matched: NDArray[np.bool_]
    is_false_positive: NDArray[np.bool_]
    is_object: NDArray[np.bool_]
    largest_missed_px: float
    """Area of the largest missed object."""

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall: 1 if all objects and nothing else were detected."""
        num_matched = int(self.is_matched.sum())
        return 2 * num_matched / max(1, int(self.is_object.sum()) + len(self.scores))

    @property
    def caption(self) -> str:
        """Summary for the caption."""
        total, missed = int(self.is_object.sum()), int((self.is_object & ~self.is_matched).sum())
        return f"{total - missed} of {total} objects found, {self.is_false_positive.sum()} false"


def render_all(run_folder: Path) -> int:
    """Select and draw images of a run. Return their number. Raise InputError if a file is missing."""
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
        *paths, skip_missing_images=config["skip_missing_images"], segmentations=has_masks, torchvision_boxes=True
    )
    min_score = pick_threshold(split, detections)
    output = run_folder / "pictures"
    output.mkdir(exist_ok=True)
    for old in output.glob("*.jpg"):
        old.unlink()
    rows: list[dict[str, str]] = []
    for group, matches in select_images(list(match_images(split, detections, min_score))):
        name = f"{len(rows):02d}_{split.image_ids[matches.index]}.jpg"
        draw_comparison(split, matches).save(output / name, quality=JPEG_QUALITY)
        rows.append({"file": name, "caption": f"{group}: {matches.caption} (score ≥ {min_score:.2f})"})
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


def pick_threshold(split: coco.Split, detections: Sequence[dict[str, Any]]) -> float:
    """Return the score threshold that keeps as many detections as there are objects."""
    scores = sorted((row["score"] for row in detections), reverse=True)
    num_objects = int((~split.is_crowd).sum())
    return float(scores[min(num_objects, len(scores)) - 1]) if scores and num_objects else 0.0


def match_images(split: coco.Split, detections: Sequence[dict[str, Any]], min_score: float) -> Iterator[ImageMatches]:
    """Yield the matches of each image that has ground truth or detections of at least `min_score`."""
    labels = {category.id: label for label, category in enumerate(split.categories, start=1)}
    by_image: dict[int, list[dict[str, Any]]] = {}
    for row in detections:
        if row["score"] >= min_score:
            by_image.setdefault(row["image_id"], []).append(row)
    for index, image_id in enumerate(split.image_ids.tolist()):
        rows = sorted(by_image.get(image_id, []), key=lambda row: -row["score"])
        boxes = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        detected_labels = np.array([labels.get(row["category_id"], 0) for row in rows], dtype=np.int64)
        if len(rows) or len(split.boxes(index)):
            scores = np.array([row["score"] for row in rows], dtype=np.float64)
            masks = [row.get("segmentation") for row in rows]
            yield match_boxes(split, index, boxes, scores, detected_labels, masks)


def match_boxes(
    split: coco.Split,
    index: int,
    boxes_xyxy: NDArray[np.float64],
    scores: NDArray[np.float64],
    labels: NDArray[np.int64],
    masks: Sequence[CocoRle | None],
) -> ImageMatches:
    """Match detections, by descending score, to the free object of their class with the highest IoU of at least 0.5.

    A detection with at least half of its area in a crowd of its class is not a false positive.
    """
    gt_boxes_xyxy, gt_labels = split.boxes(index).astype(np.float64), split.image_labels(index)
    is_crowd = split.is_crowd[split.box_offsets[index] : split.box_offsets[index + 1]]
    intersection, union, areas = pairwise_intersection(boxes_xyxy, gt_boxes_xyxy)
    same_label = labels[:, None] == gt_labels[None]
    iou = np.where(same_label & ~is_crowd, intersection / np.maximum(union, 1e-9), 0.0)
    in_crowd = (same_label & is_crowd & (intersection >= MATCH_IOU * areas)).any(axis=1)
    is_matched = np.zeros(len(gt_boxes_xyxy), dtype=bool)
    is_false_positive = np.zeros(len(scores), dtype=bool)
    for row in range(len(scores)):
        free_iou = np.where(is_matched, 0.0, iou[row])
        best = int(free_iou.argmax()) if len(free_iou) else 0
        if len(free_iou) and free_iou[best] >= MATCH_IOU:
            is_matched[best] = True
        else:
            is_false_positive[row] = not in_crowd[row]
    sides = gt_boxes_xyxy[:, 2:] - gt_boxes_xyxy[:, :2]
    missed_px = (sides[:, 0] * sides[:, 1])[~is_matched & ~is_crowd]
    largest_missed_px = float(missed_px.max(initial=0.0))
    return ImageMatches(
        index, boxes_xyxy, scores, labels, masks, is_matched, is_false_positive, ~is_crowd, largest_missed_px
    )


def pairwise_intersection(
    a_xyxy: NDArray[np.float64], b_xyxy: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return intersection (N, M) and union (N, M) of boxes (N, 4) and (M, 4), and the areas (N, 1) of the first.

    In NumPy, since detection/boxes.py needs torch, whose import takes longer than this whole command.
    """
    lower = np.maximum(a_xyxy[:, None, :2], b_xyxy[None, :, :2])
    upper = np.minimum(a_xyxy[:, None, 2:], b_xyxy[None, :, 2:])
    intersection = (upper - lower).clip(min=0).prod(axis=2)
    areas = (a_xyxy[:, 2:] - a_xyxy[:, :2]).prod(axis=1)[:, None]
    union = areas + (b_xyxy[:, 2:] - b_xyxy[:, :2]).prod(axis=1)[None] - intersection
    return intersection, union, areas


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


def draw_comparison(split: coco.Split, matches: ImageMatches) -> Image.Image:
    """Return the ground truth on the left and the detections on the right, with misses and false positives marked."""
    path = split.image_path(matches.index)
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        raise InputError(f"{path}: this image cannot be read ({error}). Replace the file.") from error
    scale = min(1.0, SIDE_PX / max(image.size))
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), reducing_gap=2.0)
    names = ["?", *(category.name for category in split.categories)]
    gt_masks = split.masks(matches.index) if split.polygons else [None] * len(matches.is_matched)
    ground_truth = [
        Annotation(tuple(box), label, names[label] + (", missed" if is_missed else ""), mask)
        for box, label, is_missed, mask in zip(
            (split.boxes(matches.index) * scale).tolist(),
            split.image_labels(matches.index).tolist(),
            (matches.is_object & ~matches.is_matched).tolist(),
            gt_masks,
            strict=True,
        )
    ]
    detections = [
        Annotation(tuple(box), label, f"{names[label]} {score:.2f}" + (", false" if is_false_positive else ""), mask)
        for box, label, score, is_false_positive, mask in zip(
            (matches.boxes_xyxy * scale).tolist(),
            matches.labels.tolist(),
            matches.scores.tolist(),
            matches.is_false_positive.tolist(),
            matches.masks,
            strict=True,
        )
    ]
    left, right = visualize.draw_annotations(image, ground_truth), visualize.draw_annotations(image, detections)
    width, height = left.size
    sheet = Image.new("RGB", (2 * width + GAP_PX, height), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (width + GAP_PX, 0))
    return sheet


@report_errors
def main(argv: list[str]) -> int:
    """Draw images of the given run. Return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m detection.evaluation.sample_predictions", description="Draw detections of a run."
    )
    parser.add_argument("run", type=Path, help="folder of a run that was evaluated")
    print(f"{render_all(parser.parse_args(argv).run)} images")
    return 0


if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(main(sys.argv[1:]))
