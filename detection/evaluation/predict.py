"""Detection on pictures, as each benchmark's command has it: python -m BENCHMARK.detect_images CHECKPOINT IMAGE...

Draws boxes, names and scores, and masks where the network has them, on copies of pictures of any size and format that
Pillow reads, and writes detections.json:

    format      1
    checkpoint  the file's name
    score       the threshold: detections below are left out
    categories  [{id, name}], as in the annotations that were trained on
    images      one entry a picture, in the order given: file, as given, and either error, why it could not be read, or
                drawn (the copy's name), width, height (pixels, as it is shown), mode (of the file, in Pillow's words),
                frames (in the file; the first is taken), and detections, the best first:
                {category_id, name, score, bbox: [x, y, width, height] in pixels of the picture as it is shown}, and
                with masks segmentation: COCO's compressed run lengths {size: [height, width], counts}

Pictures are turned as their EXIF orientation says. A picture that cannot be read is named and left out, the others go
on, and the exit status is 2. Nothing is overwritten but what an earlier call left in the same folder.

H and W are those of a picture, D its detections.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detection import atomic_file
from detection.config import device_names
from detection.config.settings import InputError
from detection.data import pillow_io
from detection.data.coco import Category
from detection.data.pillow_io import Picture
from detection.data.rle import CompressedMask
from detection.evaluation import visualize
from detection.evaluation.visualize import Mark
from detection.runtime import device

FORMAT = 1
RESULTS = "detections.json"
MOST_PIXELS = 100_000_000  # of a batch: 0.3 GB, and as much again to resize them


class Seen(NamedTuple):
    """What is detected on one picture, the best first.

    boxes_xyxy: (D, 4) pixels of the picture. scores: (D,) in [0, 1]. labels: (D,), from 1. masks: D of them, each of
    the whole picture, or None from a network that has none.
    """

    boxes_xyxy: NDArray[np.floating[Any]]
    scores: NDArray[np.floating[Any]]
    labels: NDArray[np.int64]
    masks: Sequence[CompressedMask] | None = None


class Detector(Protocol):
    """A trained network with all that is before and after it."""

    @property
    def categories(self) -> Sequence[Category]:
        """What its labels stand for: label i is categories[i - 1]."""

    def __call__(self, images: Sequence[Tensor], /) -> list[Seen]:
        """What is seen on each of some images (3, H, W) uint8 RGB, which are on the CPU and of any sizes."""


@dataclass(frozen=True)
class Command:
    """What differs between benchmarks.

    package: that of the command. load: the network of a checkpoint on a device, which leaves out detections below a
    score; raises InputError. score, batch_size: the defaults.
    """

    package: str
    load: Callable[[Path, float, torch.device], Detector]
    score: float
    batch_size: int


def main(argv: Sequence[str], command: Command) -> int:
    """Detect, draw and write; returns the exit status."""
    arguments = parse(argv, command)
    try:
        detector = command.load(arguments.checkpoint, arguments.score, device.choose(arguments.device, 0))
        paths = pillow_io.find(arguments.images)
        names = Names(arguments.folder, paths)
        entries = run(detector, paths, names, arguments)
        content = {
            "format": FORMAT,
            "checkpoint": arguments.checkpoint.name,
            "score": arguments.score,
            "categories": [{"id": category.id, "name": category.name} for category in detector.categories],
            "images": entries,
        }
        with atomic_file.writing(arguments.folder / RESULTS) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or arguments.folder}: {error.strerror or error}", file=sys.stderr)
        return 2
    unread = sum("error" in entry for entry in entries)
    count = sum(len(entry.get("detections", ())) for entry in entries)
    print(f"{count} detections on {len(entries) - unread} pictures, in {arguments.folder}/")
    if unread:
        print(f"error: {unread} of {len(entries)} pictures could not be read", file=sys.stderr)
    return 2 if unread else 0


def parse(argv: Sequence[str], command: Command) -> argparse.Namespace:
    """Read the command line; a mistake in it ends the process with 2."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {command.package}.detect_images",
        description=(__doc__ or "").rpartition("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="file in a run's checkpoints/")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="picture, or a folder of them")
    default = Path("results/detections") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    parser.add_argument(
        "--folder", type=Path, default=default, help="where the results go (results/detections/<start>)"
    )
    parser.add_argument(
        "--score", type=score, default=command.score, help="detections below are left out, 0 to 1 (%(default)s)"
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=command.batch_size,
        help="pictures that the network sees at once (%(default)s)",
    )
    parser.add_argument("--device", default="auto", help=device_names.HELP)
    return parser.parse_args(argv)


def score(text: str) -> float:
    """A threshold of scores."""
    if not 0 <= (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: should be at least 0 and below 1")
    return number


def positive(text: str) -> int:
    """A whole number from 1 up."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: should be at least 1")
    return number


class Names:
    """The names of the drawn copies in a folder, none of them twice, none that of a picture given or of another file.

    Raises InputError where the folder cannot be made or holds another program's results.
    """

    def __init__(self, folder: Path, inputs: Sequence[Path]):
        self.folder = folder
        self.inputs = {path.resolve() for path in inputs}
        self.ours, self.taken = set[str](), set[str]()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f".{RESULTS}").touch()
            (folder / f".{RESULTS}").unlink()
            if (folder / RESULTS).exists():
                content = json.loads((folder / RESULTS).read_text())
                self.ours = {entry["drawn"] for entry in content["images"] if "drawn" in entry}
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{folder}: its {RESULTS} is another program's. Choose another --folder") from None
        except OSError as error:
            raise InputError(f"{folder} cannot be written ({error.strerror}): choose another --folder") from None

    def choose(self, path: Path) -> str:
        """The name of a picture's copy: its stem, with a number where that is taken."""
        number = 1
        while True:
            name = f"{path.stem}{'' if number == 1 else f'_{number}'}.png"
            file = self.folder / name
            occupied = file.resolve() in self.inputs or (file.exists() and name not in self.ours)
            if name.lower() not in self.taken and not occupied:  # some disks take Photo and photo for one
                self.taken.add(name.lower())
                return name
            number += 1


def run(detector: Detector, paths: Sequence[Path], names: Names, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Detect on all pictures and write their drawn copies; returns the entry of each in the results."""
    entries: dict[Path, dict[str, Any]] = {path: {"file": str(path)} for path in paths}
    for batch in batches(paths, arguments.batch_size):
        read = [picture for picture in batch if isinstance(picture, Picture)]
        for path, error in (part for part in batch if not isinstance(part, Picture)):
            print(f"error: {error}", file=sys.stderr)
            entries[path]["error"] = str(error)
        seen = detector([as_tensor(picture) for picture in read]) if read else []
        for picture, of_picture in zip(read, seen, strict=True):
            found = list(entries_and_marks(of_picture, detector.categories, picture.image.size))
            name = names.choose(picture.path)
            entries[picture.path] |= {
                "drawn": name,
                "width": picture.image.width,
                "height": picture.image.height,
                "mode": picture.mode,
                "frames": picture.frames,
                "detections": [entry for entry, _ in found],
            }
            with atomic_file.writing(arguments.folder / name) as partial:
                drawn = visualize.draw(picture.image, [mark for _, mark in found])
                drawn.save(partial, "PNG", compress_level=3)
    return list(entries.values())


def batches(paths: Sequence[Path], batch_size: int) -> Iterator[list[Picture | tuple[Path, InputError]]]:
    """The pictures, or why they cannot be read, in batches of at most so many, and of not too many pixels."""
    batch: list[Picture | tuple[Path, InputError]] = []
    pixels = 0
    for path in paths:
        try:
            picture = pillow_io.read(path)
            batch.append(picture)
            pixels += picture.image.width * picture.image.height
        except InputError as error:
            batch.append((path, error))
        if len(batch) == batch_size or pixels > MOST_PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def as_tensor(picture: Picture) -> Tensor:
    """Its pixels (3, H, W) uint8 RGB."""
    return torch.from_numpy(np.array(picture.image)).permute(2, 0, 1)


def entries_and_marks(
    seen: Seen, categories: Sequence[Category], size_wh: tuple[int, int]
) -> Iterator[tuple[dict[str, Any], Mark]]:
    """Each detection on a picture of that size: its entry in the results, and how it is drawn."""
    inside = seen.boxes_xyxy.astype(np.float64).clip(0, [*size_wh, *size_wh]).tolist()
    masks: Sequence[CompressedMask | None] = seen.masks or [None] * len(inside)
    for (left, top, right, bottom), certainty, label, mask in zip(
        inside, seen.scores.tolist(), seen.labels.tolist(), masks, strict=True
    ):
        if right <= left or bottom <= top:
            continue  # wholly outside
        category = categories[label - 1]
        entry = {
            "category_id": category.id,
            "name": category.name,
            "score": round(certainty, 5),
            "bbox": [round(number, 2) for number in (left, top, right - left, bottom - top)],
        }
        if mask is not None:
            entry["segmentation"] = mask
        yield entry, Mark((left, top, right, bottom), label, f"{category.name} {certainty:.2f}", mask)
