"""Detection on a user's images: the command `predict`, which `detection/arguments.py` describes.

H and W are those of an image, D its detections.
"""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detection import atomic_file
from detection.config.settings import InputError
from detection.data import pillow_io
from detection.data.coco import Category
from detection.data.pillow_io import UserImage
from detection.data.rle import CocoRle
from detection.evaluation import visualize
from detection.evaluation.visualize import Annotation
from detection.nn.detections import Detections
from detection.runtime import device

FORMAT = 1
RESULTS = "detections.json"
MAX_NAMES = 5
MAX_BATCH_PIXELS = 100_000_000  # 0.3 GB, and as much again to resize them


class ImageDetections(NamedTuple):
    """Detections on one image by descending score.

    boxes_xyxy: (D, 4) pixels of the image. scores: (D,) in [0, 1]. labels: (D,), from 1. masks: D masks of the whole
    image, or None from a network without masks.
    """

    boxes_xyxy: NDArray[np.floating[Any]]
    scores: NDArray[np.floating[Any]]
    labels: NDArray[np.int64]
    masks: Sequence[CocoRle] | None = None


def split_by_image(detections: Detections, scales_whwh: NDArray[Any]) -> list[ImageDetections]:
    """Return the detections of each image of a batch on the CPU; scales_whwh: (B, 4) factors to its pixels."""
    batch_index, boxes, labels, scores = (field.cpu().numpy() for field in detections)
    return [
        ImageDetections(boxes[rows] * scale, scores[rows], labels[rows])
        for rows, scale in ((batch_index == index, scale) for index, scale in enumerate(scales_whwh))
    ]


class Predictor(Protocol):
    """Trained network with its preprocessing and postprocessing."""

    @property
    def categories(self) -> Sequence[Category]:
        """Return the categories: label i is categories[i - 1]."""

    def __call__(self, images: Sequence[Tensor], /) -> list[ImageDetections]:
        """Return the detections on images (3, H, W) uint8 RGB, on the CPU and of any size."""


def main(arguments: Namespace, load: Callable[[Path, float, torch.device], Predictor]) -> int:
    """Detect, draw and write, with the arguments of `detection.arguments.parse_predict`. Return the exit status.

    load: build the predictor of a checkpoint on a device, which omits detections below a score. Raises InputError.
    """
    predictor = load(arguments.checkpoint, arguments.score, device.select_device(arguments.device, 0))
    previous = read_previous_copies(arguments.folder)
    drawn = {(arguments.folder / name).resolve() for name in previous}
    paths, skipped = pillow_io.expand_paths(arguments.images, recursive=arguments.recursive, exclude=drawn)
    if skipped:
        print(f"skipped {len(skipped)} files of other kinds: {shorten_names(skipped)}")
    output_names = OutputNames(arguments.folder, paths, previous)
    entries = predict_images(predictor, paths, output_names, arguments)
    content = {
        "format": FORMAT,
        "checkpoint": arguments.checkpoint.name,
        "score": arguments.score,
        "categories": [{"id": category.id, "name": category.name} for category in predictor.categories],
        "images": entries,
    }
    with atomic_file.atomic_write(arguments.folder / RESULTS) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")
    num_errors = sum("error" in entry for entry in entries)
    num_detections = sum(len(entry.get("detections", ())) for entry in entries)
    print(f"{num_detections} detections on {len(entries) - num_errors} images, in {arguments.folder}/")
    if num_errors:
        print(f"error: {num_errors} of {len(entries)} images could not be read", file=sys.stderr)
    return 2 if num_errors == len(entries) else 0


def shorten_names(paths: Sequence[Path]) -> str:
    """Return the names of files on one line, and the number of those beyond `MAX_NAMES`."""
    names = [path.name for path in paths[:MAX_NAMES]]
    return ", ".join(names) + (f" and {len(paths) - MAX_NAMES} more" if len(paths) > MAX_NAMES else "")


def read_previous_copies(folder: Path) -> set[str]:
    """Return the names of the copies that an earlier call drew. Raises InputError for another program's results."""
    try:
        content = json.loads((folder / RESULTS).read_text())
        return {entry["drawn"] for entry in content["images"] if "drawn" in entry}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise InputError(f"{folder / RESULTS} cannot be read ({error.strerror}). Choose another --folder.") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{folder}: {RESULTS} belongs to another program. Choose another --folder.") from None


class OutputNames:
    """Unique names of the drawn copies in a folder, none of them an input's or another program's file.

    previous: names that may be overwritten. Raise InputError if the folder cannot be written.
    """

    def __init__(self, folder: Path, inputs: Sequence[Path], previous: set[str]):
        self.folder, self.previous = folder, previous
        self.inputs = {path.resolve() for path in inputs}
        self.used = set[str]()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f".{RESULTS}").touch()
            (folder / f".{RESULTS}").unlink()
        except OSError as error:
            raise InputError(f"{folder} cannot be written ({error.strerror}). Choose another --folder.") from None

    def reserve(self, path: Path) -> str:
        """Return the name for the copy of an image: its stem, with a number if that name is occupied."""
        number = 1
        while True:
            name = f"{path.stem}{'' if number == 1 else f'_{number}'}.png"
            file = self.folder / name
            is_occupied = file.resolve() in self.inputs or (file.exists() and name not in self.previous)
            if name.lower() not in self.used and not is_occupied:  # some file systems ignore case
                self.used.add(name.lower())
                return name
            number += 1


def predict_images(
    predictor: Predictor, paths: Sequence[Path], output_names: OutputNames, arguments: Namespace
) -> list[dict[str, Any]]:
    """Detect on all images and write their drawn copies. Return the `images` of the results."""
    entries: dict[Path, dict[str, Any]] = {path: {"file": str(path)} for path in paths}
    for batch in iter_batches(paths, arguments.batch_size):
        readable = [item for item in batch if isinstance(item, UserImage)]
        for path, error in (item for item in batch if not isinstance(item, UserImage)):
            print(f"error: {error}", file=sys.stderr)
            entries[path]["error"] = str(error)
        start_s = time.monotonic()
        results = predictor([to_tensor(user_image) for user_image in readable]) if readable else []
        image_ms = 1000 * (time.monotonic() - start_s) / max(1, len(readable))
        for user_image, detections in zip(readable, results, strict=True):
            formatted = list(format_detections(detections, predictor.categories, user_image.image.size))
            name = output_names.reserve(user_image.path)
            entries[user_image.path] |= {
                "drawn": name,
                "width": user_image.image.width,
                "height": user_image.image.height,
                "mode": user_image.mode,
                "frames": user_image.num_frames,
                "detections": [entry for entry, _ in formatted],
            }
            with atomic_file.atomic_write(arguments.folder / name) as partial:
                annotated = visualize.draw_annotations(user_image.image, [annotation for _, annotation in formatted])
                annotated.save(partial, "PNG", compress_level=3)
            print(f"{user_image.path}: {len(formatted)} objects, {image_ms:.0f} ms")
    return list(entries.values())


def iter_batches(paths: Sequence[Path], batch_size: int) -> Iterator[list[UserImage | tuple[Path, InputError]]]:
    """Yield batches of images, or the errors of unreadable ones, limited in length and in pixels."""
    batch: list[UserImage | tuple[Path, InputError]] = []
    pixels = 0
    for path in paths:
        try:
            user_image = pillow_io.read(path)
            batch.append(user_image)
            pixels += user_image.image.width * user_image.image.height
        except InputError as error:
            batch.append((path, error))
        if len(batch) == batch_size or pixels > MAX_BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def to_tensor(user_image: UserImage) -> Tensor:
    """Return the pixels (3, H, W) uint8 RGB."""
    return torch.from_numpy(np.array(user_image.image)).permute(2, 0, 1)


def format_detections(
    detections: ImageDetections, categories: Sequence[Category], size_wh: tuple[int, int]
) -> Iterator[tuple[dict[str, Any], Annotation]]:
    """Yield the entry in the results and the annotation to draw of each detection on an image of that size."""
    clipped_xyxy = detections.boxes_xyxy.astype(np.float64).clip(0, [*size_wh, *size_wh]).tolist()
    masks: Sequence[CocoRle | None] = detections.masks or [None] * len(clipped_xyxy)
    for (left, top, right, bottom), score, label, mask in zip(
        clipped_xyxy, detections.scores.tolist(), detections.labels.tolist(), masks, strict=True
    ):
        if right <= left or bottom <= top:
            continue  # entirely outside
        category = categories[label - 1]
        entry = {
            "category_id": category.id,
            "name": category.name,
            "score": round(score, 5),
            "bbox": [round(number, 2) for number in (left, top, right - left, bottom - top)],
        }
        if mask is not None:
            entry["segmentation"] = mask
        yield entry, Annotation((left, top, right, bottom), label, f"{category.name} {score:.2f}", mask)
