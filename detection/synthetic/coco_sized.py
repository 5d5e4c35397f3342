"""Draw a data set of COCO 2017's size, statistics and layout, to rehearse on before the download of 20 GB.

    python -m detection.synthetic.coco_sized DIR [--images 118287] [--seed 0] [--workers W] [--annotations-only]

What is in the pictures is said in `detection/synthetic/coco_scenes.py`. Whatever the number of processes, and however often it was
killed and started again, the bytes are the same on the same Pillow and NumPy. A smaller data set is the beginning of a
larger one.
"""

import argparse
import fcntl
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from detection.config.settings import InputError
from detection.synthetic import coco_scenes, toy

CONTRIBUTOR = "detection.synthetic.coco_sized"  # who drew it, in `info`
MARKER = f"{toy.SCRATCH}rehearsal"  # a file that says what is drawn here, from before the first picture on

# For the free space: what a picture and its annotations take.
PICTURE_BYTES, ROWS_BYTES = 168_000, 4_500


@dataclass(frozen=True)
class Drawing:
    """What a data set is drawn from; recorded in the `info` of its annotation files."""

    images: int = coco_scenes.TRAIN_IMAGES
    """For training; val2017 has the same share of COCO's 5,000, and at least 50."""
    seed: int = 0
    version: str = "1"  # changed with the pictures, so that old ones are not taken for them

    def counts(self) -> dict[str, int]:
        """Images of each split."""
        return {
            "train": self.images,
            "val": max(50, round(self.images * coco_scenes.VAL_IMAGES / coco_scenes.TRAIN_IMAGES)),
        }

    def mark(self) -> dict[str, Any]:
        """What the pictures are known by: all that decides their bytes. Their number does not."""
        return {"contributor": CONTRIBUTOR, "seed": self.seed, "version": self.version}

    def info(self) -> dict[str, Any]:
        """The `info` of a COCO annotation file."""
        return {
            "description": "Pictures drawn by detection.synthetic.coco_sized. This is not COCO.",
            "url": "",
            "year": 2026,
            "date_created": "2026/11/21",
            **self.mark(),
            "images": self.images,
        }


def draw(folder: Path, drawing: Drawing, *, workers: int = 0, pictures: bool = True) -> bool:
    """Draw the data set into `folder`, or find it there; True if something was drawn.

    Each picture is written aside and renamed; the annotation files come last, so that what broke off is never taken
    for done, and is gone on with by the next call. Pictures beyond `drawing.images`, of a larger drawing, stay.
    workers: processes; 0 takes as many as there are cores. pictures: whether to draw them, or annotations only.
    Raises InputError if the folder holds anything else or its disk has no room.
    """
    _refuse_foreign(folder, drawing)
    if is_complete(folder, drawing, pictures=pictures):
        return False
    missing = {split: _missing(folder, drawing, split) if pictures else 0 for split in drawing.counts()}
    _refuse_full(folder, drawing, sum(missing.values()))
    folder.mkdir(parents=True, exist_ok=True)
    workers = workers or len(os.sched_getaffinity(0))
    with _alone(folder) as marker:
        _refuse_foreign(folder, drawing)  # again: another process may have drawn meanwhile
        if is_complete(folder, drawing, pictures=pictures):
            return False
        _begin(folder, drawing, marker)
        total = sum(drawing.counts().values())
        what = f"drawing {sum(missing.values()):,} of {total:,} pictures" if pictures else "writing annotations"
        print(
            f"{folder}: {what} with {workers} processes. Broken off, it is gone on with by the next call",
            file=sys.stderr,
            flush=True,
        )
        # Not "fork", which must not meet the bar's thread.
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _end_with_parent)
        with tqdm(total=total, desc=f"drawing {folder}", unit="img", disable=None, leave=False) as progress:
            try:
                asides = [_draw_split(pool, folder, drawing, split, pictures, progress) for split in drawing.counts()]
            finally:
                pool.shutdown(cancel_futures=True)
        for part in toy.PARTS:
            for leftover in set((folder / part).glob(f"{toy.SCRATCH}*")) - set(asides):
                leftover.unlink()  # of processes that were killed
        for split, aside in zip(drawing.counts(), asides, strict=True):
            aside.replace(toy.annotation_file(folder, split))
    return True


def is_complete(folder: Path, drawing: Drawing, *, pictures: bool = True) -> bool:
    """Whether the folder holds this drawing; without `pictures` its annotations are enough."""
    if any(info != drawing.info() for info in toy.infos(folder)):
        return False
    return not pictures or not any(_missing(folder, drawing, split) for split in drawing.counts())


def _missing(folder: Path, drawing: Drawing, split: str) -> int:
    """Pictures that are not there: by one listing, which is fast on network disks too."""
    try:
        with os.scandir(folder / f"{split}2017") as entries:
            there = {entry.name for entry in entries}
    except OSError:
        there = set()
    return sum(coco_scenes.file_name(split, index) not in there for index in range(drawing.counts()[split]))


def _refuse_foreign(folder: Path, drawing: Drawing) -> None:
    """Refuse what was not drawn here, or was drawn otherwise: that may be hours of drawing, and is not thrown away."""
    foreign = InputError(f"{folder} holds something other than pictures of a rehearsal. Name a new or an empty folder.")
    if not folder.is_dir():
        if folder.exists():
            raise foreign
        return
    names = {path.name for path in folder.iterdir() if not path.name.startswith(toy.SCRATCH)}
    if not names:
        return
    says = (folder / MARKER, *(toy.annotation_file(folder, split) for split in drawing.counts()))
    known = [toy.read_info(path) for path in says if path.exists() and path.stat().st_size]
    if names - set(toy.PARTS) or not known or any(info.get("contributor") != CONTRIBUTOR for info in known):
        raise foreign
    for info in known:
        if info["seed"] != drawing.seed or info["version"] != drawing.version:
            raise InputError(
                f"{folder} holds a rehearsal of seed {info['seed']}, version {info['version']}, not of seed "
                f"{drawing.seed}, version {drawing.version}. Remove it, or name another folder."
            )


def _refuse_full(folder: Path, drawing: Drawing, pictures: int) -> None:
    disk = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    needed = pictures * PICTURE_BYTES + sum(drawing.counts().values()) * ROWS_BYTES
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise InputError(
            f"{folder}: {needed / 1e9:.2f} GB are needed for {pictures} pictures and their annotations, and its disk "
            f"has {free / 1e9:.2f} GB free. Name a folder on a larger disk, or fewer images "
            "(--images, or SYNTHETIC_IMAGES for ./run_and_time.sh)."
        )


@contextmanager
def _alone(folder: Path) -> Iterator[TextIO]:
    """The marker, locked: other processes that draw here wait."""
    with (folder / MARKER).open("a+") as marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: another process draws here; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(marker, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: nothing keeps two apart
        yield marker


def _begin(folder: Path, drawing: Drawing, marker: TextIO) -> None:
    """Say in the folder whose pictures it holds, and take away what would be taken for done."""
    if toy.read_info(folder / MARKER) != drawing.mark():
        marker.truncate(0)
        marker.write(json.dumps({"info": drawing.mark()}))
        marker.flush()
        os.fsync(marker.fileno())  # before any picture, even if the power fails: without it the folder is refused
    for part in toy.PARTS:
        (folder / part).mkdir(exist_ok=True)
    for split in drawing.counts():
        annotation_file = toy.annotation_file(folder, split)
        annotation_file.unlink(missing_ok=True)
        annotation_file.with_name(f"bbox_only_{annotation_file.name}").unlink(missing_ok=True)  # of prepare-json.py


def _end_with_parent() -> None:
    """In a worker: a killed parent leaves no processes behind, and Ctrl-C is the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _draw_split(
    pool: ProcessPoolExecutor, folder: Path, drawing: Drawing, split: str, pictures: bool, progress: "tqdm[Any]"
) -> Path:
    """Draw one split, but for its annotation file, which comes back under another name."""
    count = drawing.counts()[split]
    shards = range(math.ceil(count / coco_scenes.SHARD))
    drawn = pool.map(partial(_draw_shard, folder, drawing, split, pictures), shards)
    aside = folder / "annotations" / f"{toy.SCRATCH}{split}"
    images = [row for shard in shards for row in coco_scenes.image_rows(drawing.seed, split, shard)][:count]
    head = {
        "info": drawing.info(),
        "licenses": [{"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}],
        "images": images,
        "annotations": [],
    }
    with aside.open("w") as file:
        file.write(json.dumps(head).removesuffix("]}"))
        separator = ""
        for shard, rows in zip(shards, drawn, strict=True):
            if rows:
                file.write(separator + rows)
                separator = ", "
            progress.update(min(coco_scenes.SHARD, count - shard * coco_scenes.SHARD))
        categories = [{"supercategory": c.supercategory, "id": c.id, "name": c.name} for c in coco_scenes.COCO]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    return aside


def _draw_shard(folder: Path, drawing: Drawing, split: str, pictures: bool, shard: int) -> str:
    """Draw the pictures of a shard that are not there; returns its annotations, as JSON without the brackets."""
    plan = coco_scenes.plan(drawing.seed, split, shard)
    count = min(coco_scenes.SHARD, drawing.counts()[split] - shard * coco_scenes.SHARD)
    if pictures:
        for image in range(count):
            path = folder / f"{split}2017" / coco_scenes.file_name(split, shard * coco_scenes.SHARD + image)
            # After a loss of power a file can be there and be empty.
            if not path.exists() or not path.stat().st_size:
                aside = path.with_name(f"{toy.SCRATCH}{os.getpid()}")
                aside.write_bytes(coco_scenes.picture(plan, image))
                aside.replace(path)
    rows = [row for image in range(count) for row in coco_scenes.annotation_rows(plan, image)]
    return json.dumps(rows)[1:-1]


def _main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m detection.synthetic.coco_sized", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "folder", metavar="DIR", type=Path, help="new or empty, or an earlier drawing, also a part of it"
    )
    parser.add_argument(
        "--images", metavar="N", type=toy.positive, default=coco_scenes.TRAIN_IMAGES, help="for training"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=Drawing.seed, help="0 or more")
    parser.add_argument("--workers", metavar="W", type=toy.positive, default=0, help="processes; as many as cores")
    parser.add_argument("--annotations-only", action="store_true", help="no pictures")
    arguments = parser.parse_args()
    if arguments.seed < 0:
        parser.error(f"argument --seed: {arguments.seed} is below 0")
    drawing = Drawing(arguments.images, arguments.seed)
    train, val = drawing.counts().values()
    what = f"{'annotations of ' if arguments.annotations_only else ''}{train} + {val} pictures (seed {drawing.seed})"
    start = time.perf_counter()
    try:
        drawn = draw(arguments.folder, drawing, workers=arguments.workers, pictures=not arguments.annotations_only)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {arguments.folder} cannot be written: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{arguments.folder}: broken off; the same command goes on", file=sys.stderr)
        return 130
    seconds = time.perf_counter() - start
    print(f"{arguments.folder}: drew {what} in {seconds:.1f} s" if drawn else f"{arguments.folder}: has {what} already")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
