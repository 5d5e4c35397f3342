"""Synthetic data set with the size, statistics and layout of COCO 2017, for a full test before the 20 GB download.

    python -m detection.synthetic.coco_sized DIR [--images 118287] [--seed 0] [--workers W] [--annotations-only]

`detection/synthetic/coco_scenes.py` defines the content of the images. The bytes depend on the seed and on the versions
of Pillow and NumPy, not on the number of processes or on interruptions. A smaller data set is a prefix of a larger one.
"""

import fcntl
import json
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from detection.arguments import parse_positive
from detection.config.settings import InputError
from detection.synthetic import coco_scenes, generated_dir
from detection.synthetic.generated_dir import LICENSES, SUBDIRS, TMP_PREFIX, annotation_path
from mlperf import stdio

GENERATOR = generated_dir.Generator("detection.synthetic.coco_sized", earlier_names=("detection.rehearsal",))
MARKER = f"{TMP_PREFIX}coco_sized"  # records the fingerprint from before the first image on
EARLIER_MARKERS = (f"{TMP_PREFIX}rehearsal",)

# Mean disk space of an image and of its annotations.
JPEG_BYTES, ANNOTATION_BYTES = 168_000, 4_500


@dataclass(frozen=True)
class CocoSizedSpec:
    """Parameters of a data set, recorded in the `info` of its annotation files."""

    train_images: int = coco_scenes.TRAIN_IMAGES
    """val2017 has the same fraction of COCO's 5,000 images, and at least 50."""
    seed: int = 0
    version: str = "1"  # changed with the images, so that existing ones are not mistaken for them

    def split_sizes(self) -> dict[str, int]:
        """Return the number of images of each split."""
        return {
            "train": self.train_images,
            "val": max(50, round(self.train_images * coco_scenes.VAL_IMAGES / coco_scenes.TRAIN_IMAGES)),
        }

    def fingerprint(self) -> dict[str, Any]:
        """Return what determines the bytes of an image. The number of images does not."""
        return {"contributor": GENERATOR.name, "seed": self.seed, "version": self.version}

    def info(self) -> dict[str, Any]:
        """Return the `info` of a COCO annotation file."""
        return {
            "description": GENERATOR.description,
            "url": "",
            "year": 2026,
            "date_created": "2026/11/21",
            **self.fingerprint(),
            "images": self.train_images,
        }


def generate(data_dir: Path, spec: CocoSizedSpec, *, workers: int = 0, with_images: bool = True) -> bool:
    """Generate the data set in `data_dir` unless it is complete. Return whether anything was generated.

    Each image is written to a temporary file and renamed. The annotation files come last, so an interrupted data set
    is never mistaken for a complete one, and the next call resumes it. Images beyond `spec.train_images`, from a larger
    data set, stay.
    workers: processes, 0 for one per core. with_images: False writes annotations only.
    Raise InputError if the folder holds anything else or its disk has too little space.
    """
    _check_owned(data_dir, spec)
    if is_complete(data_dir, spec, with_images=with_images):
        return False
    missing = {split: _count_missing(data_dir, spec, split) if with_images else 0 for split in spec.split_sizes()}
    _check_disk_space(data_dir, spec, sum(missing.values()))
    data_dir.mkdir(parents=True, exist_ok=True)
    workers = workers or len(os.sched_getaffinity(0))
    with _lock(data_dir) as marker:
        _check_owned(data_dir, spec)  # again: another process may have generated data meanwhile
        if is_complete(data_dir, spec, with_images=with_images):
            return False
        _start(data_dir, spec, marker)
        total = sum(spec.split_sizes().values())
        action = f"generating {sum(missing.values()):,} of {total:,} images" if with_images else "writing annotations"
        print(
            f"{data_dir}: {action} with {workers} processes. If interrupted, the next call resumes",
            file=sys.stderr,
            flush=True,
        )
        # Not "fork": it is unsafe beside the thread of the progress bar.
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _exit_with_parent)
        with tqdm(total=total, desc=f"generating {data_dir}", unit="img", disable=None, leave=False) as progress:
            try:
                tmp_paths = [
                    _generate_split(pool, data_dir, spec, split, with_images, progress) for split in spec.split_sizes()
                ]
            finally:
                pool.shutdown(cancel_futures=True)
        for subdir in SUBDIRS:
            for leftover in set((data_dir / subdir).glob(f"{TMP_PREFIX}*")) - set(tmp_paths):
                leftover.unlink()  # from killed processes
        for split, tmp_path in zip(spec.split_sizes(), tmp_paths, strict=True):
            tmp_path.replace(annotation_path(data_dir, split))
    return True


def is_complete(data_dir: Path, spec: CocoSizedSpec, *, with_images: bool = True) -> bool:
    """Return whether the folder holds the whole data set, or all of its annotations if `with_images` is False."""
    expected = {"seed": spec.seed, "version": spec.version, "images": spec.train_images}
    for info in generated_dir.read_infos(data_dir):
        if not (GENERATOR.owns(info) and expected.items() <= info.items()):
            return False
    return not with_images or not any(_count_missing(data_dir, spec, split) for split in spec.split_sizes())


def _count_missing(data_dir: Path, spec: CocoSizedSpec, split: str) -> int:
    """Count missing images with one directory listing, which is fast on network disks, too."""
    try:
        with os.scandir(data_dir / f"{split}2017") as entries:
            present = {entry.name for entry in entries}
    except OSError:
        present = set()
    return sum(coco_scenes.file_name(split, index) not in present for index in range(spec.split_sizes()[split]))


def _check_owned(data_dir: Path, spec: CocoSizedSpec) -> None:
    """Reject foreign data, and data of another seed or version: hours of work that must not be overwritten."""
    foreign = InputError(f"{data_dir} holds something other than synthetic COCO images. Name a new or an empty folder.")
    if not data_dir.is_dir():
        if data_dir.exists():
            raise foreign
        return
    if not (names := generated_dir.file_names(data_dir)):
        return
    markers = (data_dir / name for name in (MARKER, *EARLIER_MARKERS))
    info_files = (*markers, *(annotation_path(data_dir, split) for split in spec.split_sizes()))
    infos = [generated_dir.read_info(path) for path in info_files if path.exists() and path.stat().st_size]
    if names - set(SUBDIRS) or not infos or not all(map(GENERATOR.owns, infos)):
        raise foreign
    for info in infos:
        if info["seed"] != spec.seed or info["version"] != spec.version:
            raise InputError(
                f"{data_dir} holds a synthetic COCO of seed {info['seed']}, version {info['version']}, not of seed "
                f"{spec.seed}, version {spec.version}. Remove it, or name another folder."
            )


def _check_disk_space(data_dir: Path, spec: CocoSizedSpec, num_images: int) -> None:
    disk = next(parent for parent in (data_dir.absolute(), *data_dir.absolute().parents) if parent.exists())
    needed = num_images * JPEG_BYTES + sum(spec.split_sizes().values()) * ANNOTATION_BYTES
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise InputError(
            f"{data_dir}: {num_images} images and the annotations need {needed / 1e9:.2f} GB, and the disk has "
            f"{free / 1e9:.2f} GB free. Name a folder on a larger disk, or fewer images "
            "(--images, or SYNTHETIC_IMAGES for ./run_and_time.sh)."
        )


@contextmanager
def _lock(data_dir: Path) -> Iterator[TextIO]:
    """Yield the locked marker. Other processes that generate into this folder wait."""
    with (data_dir / MARKER).open("a+") as marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{data_dir}: another process is generating it. Waiting", file=sys.stderr, flush=True)
            fcntl.flock(marker, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks cannot keep processes apart
        yield marker


def _start(data_dir: Path, spec: CocoSizedSpec, marker: TextIO) -> None:
    """Write the marker, and remove the files that would make the data set look complete."""
    if generated_dir.read_info(data_dir / MARKER) != spec.fingerprint():
        marker.truncate(0)
        marker.write(json.dumps({"info": spec.fingerprint()}))
        marker.flush()
        # Before any image, even if the power fails: a folder without the marker is rejected.
        os.fsync(marker.fileno())
    for subdir in SUBDIRS:
        (data_dir / subdir).mkdir(exist_ok=True)
    for split in spec.split_sizes():
        path = annotation_path(data_dir, split)
        path.unlink(missing_ok=True)
        path.with_name(f"bbox_only_{path.name}").unlink(missing_ok=True)  # by prepare-json.py


def _exit_with_parent() -> None:
    """Set up a worker: exit when the parent dies, and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def wait_for_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


def _generate_split(
    pool: ProcessPoolExecutor, data_dir: Path, spec: CocoSizedSpec, split: str, with_images: bool, progress: "tqdm[Any]"
) -> Path:
    """Generate one split. Return the temporary path of its annotation file."""
    count = spec.split_sizes()[split]
    shards = range(math.ceil(count / coco_scenes.SHARD_SIZE))
    shard_rows = pool.map(partial(_generate_shard, data_dir, spec, split, with_images), shards)
    tmp_path = data_dir / "annotations" / f"{TMP_PREFIX}{split}"
    images = [row for shard in shards for row in coco_scenes.make_image_rows(spec.seed, split, shard)][:count]
    header = {"info": spec.info(), "licenses": LICENSES, "images": images, "annotations": []}
    with tmp_path.open("w") as file:
        file.write(json.dumps(header).removesuffix("]}"))
        separator = ""
        for shard, rows in zip(shards, shard_rows, strict=True):
            if rows:
                file.write(separator + rows)
                separator = ", "
            progress.update(min(coco_scenes.SHARD_SIZE, count - shard * coco_scenes.SHARD_SIZE))
        categories = [
            {"supercategory": category.supercategory, "id": category.id, "name": category.name}
            for category in coco_scenes.COCO_CATEGORIES
        ]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    return tmp_path


def _generate_shard(data_dir: Path, spec: CocoSizedSpec, split: str, with_images: bool, shard: int) -> str:
    """Generate the missing images of a shard. Return its annotations as JSON without the brackets."""
    plan = coco_scenes.plan_shard(spec.seed, split, shard)
    first = shard * coco_scenes.SHARD_SIZE
    count = min(coco_scenes.SHARD_SIZE, spec.split_sizes()[split] - first)
    if with_images:
        for image in range(count):
            path = data_dir / f"{split}2017" / coco_scenes.file_name(split, first + image)
            # A power failure can leave an empty file.
            if not path.exists() or not path.stat().st_size:
                tmp_path = path.with_name(f"{TMP_PREFIX}{os.getpid()}")
                tmp_path.write_bytes(coco_scenes.render_jpeg(plan, image))
                tmp_path.replace(path)
    rows = [row for image in range(count) for row in coco_scenes.make_annotation_rows(plan, image)]
    return json.dumps(rows)[1:-1]


def _main() -> int:
    parser = generated_dir.make_parser(
        GENERATOR, "Generate a data set with the size, statistics and layout of COCO 2017. If interrupted, resume it."
    )
    parser.add_argument(
        "--images",
        metavar="N",
        type=parse_positive,
        default=coco_scenes.TRAIN_IMAGES,
        help="for training (%(default)s)",
    )
    parser.add_argument("--workers", metavar="W", type=parse_positive, default=0, help="processes (one per core)")
    parser.add_argument("--annotations-only", action="store_true", help="write no images")
    arguments = parser.parse_args()
    spec = CocoSizedSpec(arguments.images, arguments.seed)
    train, val = spec.split_sizes().values()
    content = f"{'annotations of ' if arguments.annotations_only else ''}{train} + {val} images (seed {spec.seed})"
    options = {"workers": arguments.workers, "with_images": not arguments.annotations_only}
    return generated_dir.run(arguments.data_dir, content, partial(generate, arguments.data_dir, spec, **options))


if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(_main())
