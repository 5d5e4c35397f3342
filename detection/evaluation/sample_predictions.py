"""What a run detected beside the truth: python -m detection.evaluation.sample_predictions RUN_FOLDER

Chooses a dozen evaluation images at most (the best, typical ones, large objects that were missed, mistakes made with
confidence), and writes them to pictures/ in the run's folder, with captions in pictures.json. It reads the run's
config.json and detections.json, or bbox.json and segm.json, whose masks are drawn, too, and the data; no network and no
torch, so it is done in seconds. Objects are found by their boxes.

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
from detection.config.settings import InputError
from detection.data import coco
from detection.data.rle import CompressedMask
from detection.evaluation import visualize
from detection.evaluation.visualize import Mark

OF_EACH_KIND = 3
MATCH_IOU = 0.5
SIDE_PX = 480  # the longer one of a half
GAP_PX = 6
JPEG_QUALITY = 80


@dataclass(frozen=True)
class Judged:
    """One image, and what became of its boxes.

    boxes_xyxy: (D, 4) pixels, with scores (D,), labels (D,) and D masks, None without, the highest score first.
    found: (G,) whether a detection matches the object. wrong: (D,) whether the detection matches none. is_object: (G,),
    all but crowds.
    """

    index: int
    boxes_xyxy: NDArray[np.float64]
    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    masks: Sequence[CompressedMask | None]
    found: NDArray[np.bool_]
    wrong: NDArray[np.bool_]
    is_object: NDArray[np.bool_]
    missed_px: float
    """Area of the largest object that is missed."""

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall: 1 where all objects were found and nothing else."""
        hits = int(self.found.sum())
        return 2 * hits / max(1, int(self.is_object.sum()) + len(self.scores))

    @property
    def caption(self) -> str:
        """What the picture shows, in words."""
        total, missed, wrong = int(self.is_object.sum()), int((self.is_object & ~self.found).sum()), self.wrong.sum()
        return f"{total - missed} of {total} objects found, {wrong} false"


def make(folder: Path) -> int:
    """Choose and draw the pictures of a run; returns how many. Raises InputError where something is not there."""
    config = read_json(folder / run_dir.CONFIG)
    masks = (folder / "segm.json").is_file()
    detections = with_masks(folder) if masks else read_json(folder / "detections.json")
    named = config.get("val_annotations")
    files = (Path(named), Path(config["val_images"])) if named else coco.layout(Path(config["data_dir"]), "val")
    split = coco.read(*files, skip_missing_images=config["skip_missing_images"], segmentations=masks)
    least = threshold(split, detections)
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for old in pictures.glob("*.jpg"):
        old.unlink()
    rows: list[dict[str, str]] = []
    for kind, judged in chosen(list(judge(split, detections, least))):
        name = f"{len(rows):02d}_{split.image_ids[judged.index]}.jpg"
        draw(split, judged).save(pictures / name, quality=JPEG_QUALITY)
        rows.append({"file": name, "caption": f"{kind}: {judged.caption} (score ≥ {least:.2f})"})
    (folder / "pictures.json").write_text(json.dumps(rows, ensure_ascii=False))
    return len(rows)


def read_json(path: Path) -> Any:
    """The content of a file that the run left; raises InputError."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}). Name the folder of a run that was evaluated") from error


def with_masks(folder: Path) -> list[dict[str, Any]]:
    """The boxes of a run, each with its mask; raises InputError."""
    boxes, masks = read_json(folder / "bbox.json"), read_json(folder / "segm.json")
    if len(boxes) != len(masks):
        raise InputError(
            f"{folder}: bbox.json has {len(boxes)} detections and segm.json {len(masks)}; a run leaves both alike. "
            "Evaluate its checkpoint again"
        )
    return [box | {"segmentation": mask["segmentation"]} for box, mask in zip(boxes, masks, strict=True)]


def threshold(split: coco.Split, detections: Sequence[dict[str, Any]]) -> float:
    """The score above which there are as many detections as objects: what the run itself takes for sure enough."""
    scores = sorted((row["score"] for row in detections), reverse=True)
    wanted = int((~split.crowd).sum())
    return float(scores[min(wanted, len(scores)) - 1]) if scores and wanted else 0.0


def judge(split: coco.Split, detections: Sequence[dict[str, Any]], least_score: float) -> Iterator[Judged]:
    """Each image that has objects or detections of at least that score, held against its truth."""
    labels = {category.id: label for label, category in enumerate(split.categories, start=1)}
    by_image: dict[int, list[dict[str, Any]]] = {}
    for row in detections:
        if row["score"] >= least_score:
            by_image.setdefault(row["image_id"], []).append(row)
    for index, image_id in enumerate(split.image_ids.tolist()):
        rows = sorted(by_image.get(image_id, []), key=lambda row: -row["score"])
        boxes = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found_labels = np.array([labels.get(row["category_id"], 0) for row in rows], dtype=np.int64)
        if len(rows) or len(split.boxes(index)):
            scores = np.array([row["score"] for row in rows], dtype=np.float64)
            masks = [row.get("segmentation") for row in rows]
            yield match(split, index, boxes, scores, found_labels, masks)


def match(
    split: coco.Split,
    index: int,
    boxes_xyxy: NDArray[np.float64],
    scores: NDArray[np.float64],
    labels: NDArray[np.int64],
    masks: Sequence[CompressedMask | None],
) -> Judged:
    """Give each object the best detection of its class that overlaps it by half or more, the highest score first.

    A detection that lies in a crowd of its class by half or more is no mistake.
    """
    truth, truth_labels = split.boxes(index).astype(np.float64), split.image_labels(index)
    crowd = split.crowd[split.box_starts[index] : split.box_starts[index + 1]]
    inner, union, own = overlaps(boxes_xyxy, truth)
    same = labels[:, None] == truth_labels[None]
    iou = np.where(same & ~crowd, inner / np.maximum(union, 1e-9), 0.0)
    in_crowd = (same & crowd & (inner >= MATCH_IOU * own)).any(axis=1)
    found = np.zeros(len(truth), dtype=bool)
    wrong = np.zeros(len(scores), dtype=bool)
    for row in range(len(scores)):
        free = np.where(found, 0.0, iou[row])
        best = int(free.argmax()) if len(free) else 0
        if len(free) and free[best] >= MATCH_IOU:
            found[best] = True
        else:
            wrong[row] = not in_crowd[row]
    sides = truth[:, 2:] - truth[:, :2]
    missed = (sides[:, 0] * sides[:, 1])[~found & ~crowd]
    return Judged(index, boxes_xyxy, scores, labels, masks, found, wrong, ~crowd, float(missed.max(initial=0.0)))


def overlaps(
    a_xyxy: NDArray[np.float64], b_xyxy: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Intersection (N, M) and union (N, M) of every pair of boxes (N, 4) and (M, 4), and the areas (N, 1) of the first.

    In NumPy, since detection/boxes.py needs torch, which takes longer to load than all of this takes.
    """
    lower = np.maximum(a_xyxy[:, None, :2], b_xyxy[None, :, :2])
    upper = np.minimum(a_xyxy[:, None, 2:], b_xyxy[None, :, 2:])
    inner = (upper - lower).clip(min=0).prod(axis=2)
    own = (a_xyxy[:, 2:] - a_xyxy[:, :2]).prod(axis=1)[:, None]
    return inner, own + (b_xyxy[:, 2:] - b_xyxy[:, :2]).prod(axis=1)[None] - inner, own


def chosen(images: Sequence[Judged]) -> Iterator[tuple[str, Judged]]:
    """A few images of each kind, none of them twice."""
    taken: set[int] = set()
    middle = sorted(image.f1 for image in images if image.is_object.any())
    median = middle[len(middle) // 2] if middle else 0.0
    # What is sorted by, and what an image must have to be of the kind.
    kinds: list[tuple[str, Callable[[Judged], Any], Callable[[Judged], Any]]] = [
        ("missed", lambda image: -image.missed_px, lambda image: image.missed_px > 0),
        ("false", lambda image: -image.scores[image.wrong].max(initial=0.0), lambda image: image.wrong.any()),
        ("best", lambda image: (-image.f1, -image.is_object.sum()), lambda image: image.found.any()),
        ("typical", lambda image: abs(image.f1 - median), lambda image: image.is_object.any()),
    ]
    for name, order, fits in kinds:
        fitting = sorted((i for i in images if i.index not in taken and fits(i)), key=lambda i: (order(i), i.index))
        for image in fitting[:OF_EACH_KIND]:
            taken.add(image.index)
            yield name, image


def draw(split: coco.Split, judged: Judged) -> Image.Image:
    """The truth on the left, the detections on the right, what is missed or false named so."""
    path = split.image_path(judged.index)
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        raise InputError(f"{path}: this image cannot be read ({error}). Replace the file") from error
    scale = min(1.0, SIDE_PX / max(image.size))
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), reducing_gap=2.0)
    names = ["?", *(category.name for category in split.categories)]
    true_masks = split.masks(judged.index) if split.outlines else [None] * len(judged.found)
    truth = [
        Mark(tuple(box), label, names[label] + ("" if found else ", missed"), mask)
        for box, label, found, mask in zip(
            (split.boxes(judged.index) * scale).tolist(),
            split.image_labels(judged.index).tolist(),
            (judged.found | ~judged.is_object).tolist(),
            true_masks,
            strict=True,
        )
    ]
    detected = [
        Mark(tuple(box), label, f"{names[label]} {score:.2f}" + (", false" if wrong else ""), mask)
        for box, label, score, wrong, mask in zip(
            (judged.boxes_xyxy * scale).tolist(),
            judged.labels.tolist(),
            judged.scores.tolist(),
            judged.wrong.tolist(),
            judged.masks,
            strict=True,
        )
    ]
    halves = [visualize.draw(image, truth), visualize.draw(image, detected)]
    width, height = halves[0].size
    sheet = Image.new("RGB", (2 * width + GAP_PX, height), "white")
    sheet.paste(halves[0], (0, 0))
    sheet.paste(halves[1], (width + GAP_PX, 0))
    return sheet


def main(argv: list[str]) -> int:
    """Draw the pictures of the run that is named; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m detection.evaluation.sample_predictions", description="Draw what a run detected."
    )
    parser.add_argument("run", type=Path, help="folder of a run that was evaluated")
    try:
        count = make(parser.parse_args(argv).run)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{count} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
