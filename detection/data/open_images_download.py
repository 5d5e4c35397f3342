"""Download of the Open Images v6 subset of MLPerf's RetinaNet, without fiftyone.

    python -m detection.data.open_images_download DATADIR

Writes DATADIR/{train,validation}/data/ID.jpg, metadata/*.csv, labels/detections.csv and labels/openimages-mlperf.json,
as fiftyone 0.15.1 lays them out, and labels/openimages-mlperf.npz, the same boxes as arrays, which open in seconds.
After an interruption, run it again: it continues.
The subset is every image with a box of one of 264 classes: 1,170,301 for training, 24,781 for validation, 352 GB.
Their names come from retired_benchmarks/retinanet/scripts/download_openimages_mlperf.sh of mlcommons/training.
"""

import argparse
import errno
import io
import os
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from detection import atomic_file
from detection.config.settings import InputError, report_errors
from detection.data import coco_arrays
from detection.data import open_images_labels as labels
from detection.data.http_download import DownloadError, MissingFileError, fetch, fetch_file
from detection.data.open_images import ANNOTATION_FILE, IMAGE_DIR
from mlperf import stdio

ANNOTATIONS_URL = "https://storage.googleapis.com/openimages"
IMAGES_URL = "https://open-images-dataset.s3.amazonaws.com"
CLASSES_FILE = Path(__file__).with_name("open_images_classes.txt")
MEAN_IMAGE_BYTES = 295_000  # 352 GB for 1,195,082 images
MAX_MISSING_IMAGES = 1000  # more than that is a wrong address
MAX_SHOWN_IMAGES = 10
IMAGES_PER_TASK = 1000
DESCRIPTION = "Open Images v6, subset of MLPerf's RetinaNet, written by detection.data.open_images_download"


class Sources(NamedTuple):
    """Paths of the files of one split below ANNOTATIONS_URL, as fiftyone 0.15.1 chooses them."""

    boxes: str
    image_ids: str
    num_images: int
    """Images of the subset."""


SOURCES = {
    "validation": Sources(
        "v5/validation-annotations-bbox.csv", "2018_04/validation/validation-images-with-rotation.csv", 24_781
    ),
    "train": Sources(
        "v6/oidv6-train-annotations-bbox.csv", "2018_04/train/train-images-boxable-with-rotation.csv", 1_170_301
    ),
}
CLASS_NAMES = "v5/class-descriptions-boxable.csv"


class Options(NamedTuple):
    """Arguments of the command line. max_images: of each split, or None for all."""

    annotations_url: str
    images_url: str
    names: tuple[str, ...]
    max_images: int | None
    workers: int
    skip_missing: bool


@report_errors
def main(argv: Sequence[str]) -> int:
    """Download both splits. Return 2 on a user's mistake, and 1 if the network or the disk fails."""
    parser = argparse.ArgumentParser(
        prog="python -m detection.data.open_images_download",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data_dir", type=Path, help="target folder")
    parser.add_argument("--annotations-url", default=ANNOTATIONS_URL, help="mirror that contains v5/, v6/ and 2018_04/")
    parser.add_argument("--images-url", default=IMAGES_URL, help="mirror that contains train/ and validation/")
    parser.add_argument(
        "--classes", type=Path, default=CLASSES_FILE, help="file of class names, one per line, in order"
    )
    parser.add_argument("--max-images", default="", help="only the first images of each split, for a trial")
    parser.add_argument("--workers", default="32", help="images to download at a time")
    parser.add_argument("--skip-missing", action="store_true", help="leave out images that the server does not have")
    arguments = parser.parse_args(argv)
    options = Options(
        annotations_url=arguments.annotations_url.rstrip("/"),
        images_url=arguments.images_url.rstrip("/"),
        names=read_names(arguments.classes),
        max_images=parse_count("--max-images", arguments.max_images) if arguments.max_images else None,
        workers=parse_count("--workers", arguments.workers),
        skip_missing=arguments.skip_missing,
    )
    try:
        for split in SOURCES:
            download_split(arguments.data_dir, split, options)
    except DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        problem = f"{error.filename}: {error.strerror}. Free some space and run this again: it continues"
        print(f"error: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted. Run this again: it continues", file=sys.stderr)
        return 1
    return 0


def parse_count(flag: str, text: str) -> int:
    """Return a positive integer. Raises InputError for anything else."""
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{flag} {text}: not a positive integer.")
    return int(text)


def read_names(path: Path) -> tuple[str, ...]:
    """Read the class names, one per line. Raises InputError if there are none, or one occurs twice."""
    names = tuple(path.read_text(encoding="utf-8").splitlines())
    if not names or len(set(names)) < len(names):
        raise InputError(f"{path}: {'a name occurs twice' if names else 'it has no names'}. Write one name per line.")
    return names


def download_split(data_dir: Path, split: str, options: Options) -> None:
    """Download annotations and images of a split, and write its annotation file, unless it is complete.

    Raises InputError, DownloadError, or OSError if a file cannot be written.
    """
    folder, sources = data_dir / split, SOURCES[split]
    annotation_file, image_dir = folder / ANNOTATION_FILE, folder / IMAGE_DIR
    info = {"description": DESCRIPTION, "version": "v6", "max_images": options.max_images}
    if annotation_file.exists() and is_complete(annotation_file, image_dir, info):
        print(f"{annotation_file} already exists")
        coco_arrays.update(annotation_file)
        return
    files = {
        folder / "metadata" / "classes.csv": CLASS_NAMES,
        folder / "metadata" / "image_ids.csv": sources.image_ids,
        folder / "labels" / "detections.csv": sources.boxes,
    }
    for path, source in files.items():
        if not path.exists():
            download_file(f"{options.annotations_url}/{source}", path)
    classes_csv, image_ids_csv, boxes_csv = files
    print(f"reading {boxes_csv}")
    boxes = labels.read_boxes(boxes_csv, labels.read_category_ids(classes_csv, options.names))
    image_ids = np.intersect1d(boxes.image_ids, labels.read_image_ids(image_ids_csv))[: options.max_images]
    if not len(image_ids):
        raise InputError(f"{boxes_csv}: no box has one of the {len(options.names)} classes. Check OPENIMAGES_CLASSES.")

    missing = download_images(image_ids, f"{options.images_url}/{split}", image_dir, options.workers)
    if missing:
        shown = ", ".join(labels.format_id(key) for key in missing[:MAX_SHOWN_IMAGES])
        problem = f"{options.images_url}/{split}: {len(missing)} of {len(image_ids)} images are missing: {shown}"
        problem += ", ..." if len(missing) > MAX_SHOWN_IMAGES else ""
        if not options.skip_missing:
            raise DownloadError(
                f"{problem}. Run this again to retry them, or with OPENIMAGES_SKIP_MISSING=1 to leave them out, which "
                "MLPerf does not allow"
            )
        print(f"warning: {problem}. They are left out with their boxes", file=sys.stderr)
        image_ids = np.setdiff1d(image_ids, np.array(missing, dtype=np.uint64))
    print(f"reading the sizes of the images in {image_dir}")
    sizes_wh = read_sizes(image_ids, image_dir, options.workers)
    boxes = boxes.select(image_ids)
    info |= {"num_images": len(image_ids), "num_missing": len(missing)}
    columns = labels.make_columns(options.names, image_ids, sizes_wh, boxes)
    labels.write_coco(annotation_file, info, columns, boxes.flags)
    print(f"{annotation_file}: {len(image_ids)} images, {len(boxes.image_ids)} boxes, {len(options.names)} classes")
    coco_arrays.write(annotation_file, columns, coco_arrays.read_signature(annotation_file))
    if options.max_images is None and len(image_ids) != sources.num_images:
        print(f"warning: MLPerf's {split} split has {sources.num_images} images", file=sys.stderr)


def is_complete(annotation_file: Path, image_dir: Path, info: Mapping[str, object]) -> bool:
    """Return whether an earlier call with the same `info` wrote the annotations, and the number of images is right.

    Raises InputError if another program wrote them.
    """
    written = labels.read_info(annotation_file)
    if written.get("description") != info["description"]:
        raise InputError(
            f"{annotation_file}: another program wrote it. Train with it as it is, or remove it and run this again."
        )
    return (
        image_dir.is_dir()
        and written.get("num_missing") == 0
        and info.items() <= written.items()
        and sum(name.endswith(".jpg") for name in os.listdir(image_dir)) >= written["num_images"]
    )


def download_file(url: str, path: Path) -> None:
    """Download a file with a progress bar. Raises DownloadError, or OSError if it cannot be written."""
    print(f"downloading {url}")
    with progress_bar(path.name, unit="B", unit_scale=True) as bar:

        def report(size: int, total: int | None) -> None:
            bar.total = total
            bar.update(size - bar.n)

        fetch_file(url, path, report)


def download_images(image_ids: NDArray[np.uint64], url: str, image_dir: Path, workers: int) -> list[int]:
    """Download the images (N,) that the folder lacks, and return the ids of those that the server does not have.

    Raises InputError if the disk is too small, DownloadError, or OSError if a file cannot be written.
    """
    image_dir.mkdir(parents=True, exist_ok=True)
    present = set(os.listdir(image_dir))
    todo = [key for key in image_ids.tolist() if f"{labels.format_id(key)}.jpg" not in present]
    check_disk(image_dir, len(todo))
    missing: list[int] = []
    lock, stopped, queue = threading.Lock(), threading.Event(), iter(todo)

    def work() -> None:
        while not stopped.is_set():
            with lock:
                key = next(queue, None)
            if key is None:
                return
            try:
                download_image(url, image_dir / f"{labels.format_id(key)}.jpg")
            except MissingFileError as error:
                missing.append(key)
                if len(missing) > MAX_MISSING_IMAGES:
                    raise DownloadError(f"{error}, and so it did for {MAX_MISSING_IMAGES} other images") from None
            with lock:
                bar.update()

    done = len(image_ids) - len(todo)
    with (
        progress_bar(image_dir.parent.name, unit="img", total=len(image_ids), initial=done) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        try:
            for task in as_completed([pool.submit(work) for _ in range(min(workers, len(todo)))]):
                task.result()
        finally:
            stopped.set()
    return sorted(missing)


def download_image(url: str, path: Path) -> None:
    """Download an image of a split. Raises DownloadError, or OSError if the file cannot be written."""
    source = f"{url}/{path.name}"
    content = fetch(source)
    try:
        read_size(io.BytesIO(content))
    except OSError:
        raise DownloadError(f"{source}: the server sent no JPEG image") from None
    with atomic_file.atomic_write(path) as partial:
        partial.write_bytes(content)


def check_disk(image_dir: Path, num_images: int) -> None:
    """Raise InputError if the disk cannot hold as many images."""
    needed, free = num_images * MEAN_IMAGE_BYTES, shutil.disk_usage(image_dir).free
    if needed > free:
        raise InputError(
            f"{image_dir}: {num_images} images need about {needed / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB "
            "free. Free some space, name another DATADIR, or set OPENIMAGES_MAX_IMAGES."
        )


def read_sizes(image_ids: NDArray[np.uint64], image_dir: Path, workers: int) -> NDArray[np.int64]:
    """Read width and height of each image from its header: (N, 2). Raises InputError for a broken file."""

    def read_block(start: int) -> list[tuple[int, int]]:
        sizes = []
        for key in image_ids[start : start + IMAGES_PER_TASK].tolist():
            path = image_dir / f"{labels.format_id(key)}.jpg"
            try:
                sizes.append(read_size(path))
            except OSError as error:
                raise InputError(
                    f"{path}: this image cannot be read ({error}). Remove it and run this again."
                ) from None
        return sizes

    with ThreadPoolExecutor(workers) as pool:
        blocks = pool.map(read_block, range(0, len(image_ids), IMAGES_PER_TASK))
        return np.array([size for block in blocks for size in block], dtype=np.int64).reshape(-1, 2)


def read_size(file: Path | IO[bytes]) -> tuple[int, int]:
    """Return width and height as stored, whatever EXIF says of the orientation. Raises OSError for no JPEG image."""
    with Image.open(file, formats=("JPEG",)) as image:
        return image.size


def progress_bar(name: str, *, unit: str, total: int = 0, initial: int = 0, unit_scale: bool = False) -> "tqdm[None]":
    """Return a progress bar with rate and time left: one line in a terminal, or a line every half minute in a log."""
    interval_s = 0.5 if sys.stderr.isatty() else 30
    return tqdm(
        desc=name, total=total or None, initial=initial, unit=unit, unit_scale=unit_scale, mininterval=interval_s
    )


if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(main(sys.argv[1:]))
