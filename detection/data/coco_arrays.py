"""Columns of an annotation file as arrays in a file next to it, from which millions of boxes open in seconds.

    python -m detection.data.coco_arrays FILE.json ...

FILE.npz holds the columns of FILE.json, but no masks. It is written for valid files only, and read only while size and
modification time of FILE.json are those that it records. Each array has a checksum, so that damage is noticed.
"""

import argparse
import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detection import atomic_file
from detection.config.settings import InputError, report_errors
from detection.data import coco_json
from detection.data.coco_json import Columns, Integers
from mlperf import stdio

FORMAT_VERSION = 1
INTEGERS = ("image_ids", "sizes_hw", "category_ids", "annotation_ids", "box_image_ids", "box_category_ids", "is_crowd")
ARRAYS = (*INTEGERS, "boxes_xywh", "areas")
TEXTS = ("file_names", "category_names", "remarks")
SIGNATURE = "signature"
INTEGER_TYPES = (np.int16, np.int32, np.int64)


@report_errors
def main(argv: Sequence[str]) -> int:
    """Write the arrays of each annotation file. Return 2 if one of them is invalid or cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python -m detection.data.coco_arrays",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json", help="annotation file in COCO's format")
    for annotation_file in parser.parse_args(argv).files:
        try:
            update(annotation_file)
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}. Check its folder and run this again.") from None
    return 0


def arrays_path(annotation_file: Path) -> Path:
    """Return the path of the arrays of an annotation file."""
    return annotation_file.with_suffix(".npz")


def update(annotation_file: Path) -> None:
    """Write the arrays of an annotation file unless they are current. Raise InputError if it is invalid, or OSError."""
    if read_arrays(annotation_file):
        print(f"{arrays_path(annotation_file)} is current")
    else:
        signature = read_signature(annotation_file)
        write(annotation_file, coco_json.read(annotation_file), signature)


def write(annotation_file: Path, columns: Columns, signature: list[int]) -> None:
    """Write the columns of an annotation file. Raise InputError if they are invalid, or OSError.

    signature: that of the file when the columns were read or written.
    """
    path = arrays_path(annotation_file)
    coco_json.raise_if_any(annotation_file, coco_json.validate(columns))
    arrays: dict[str, Any] = {SIGNATURE: signature} | {name: getattr(columns, name) for name in ARRAYS}
    arrays |= {name: _narrow(arrays[name]) for name in INTEGERS}
    arrays |= {name: np.frombuffer(json.dumps(getattr(columns, name)).encode(), np.uint8) for name in TEXTS}
    with atomic_file.atomic_write(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)
    print(f"{path}: {len(columns.image_ids)} images, {len(columns.boxes_xywh)} boxes")


def read_signature(annotation_file: Path) -> list[int]:
    """Return version of the format, size and modification time of an annotation file. Raise OSError if missing."""
    state = annotation_file.stat()
    return [FORMAT_VERSION, state.st_size, state.st_mtime_ns]


def read(annotation_file: Path, segmentations: bool = False, *, allow_unlabeled: bool = False) -> Columns:
    """Read the columns of an annotation file, from its arrays if they are current.

    The arrays have no masks: with `segmentations`, the annotation file itself is read. Raises InputError as
    `coco_json.read`.
    """
    columns = None if segmentations else read_arrays(annotation_file)
    return columns or coco_json.read(annotation_file, segmentations, allow_unlabeled=allow_unlabeled)


def read_arrays(annotation_file: Path) -> Columns | None:
    """Read the arrays of an annotation file. Return None if they are missing or damaged, or the file changed since."""
    try:
        with np.load(arrays_path(annotation_file)) as arrays:
            if arrays[SIGNATURE].tolist() != read_signature(annotation_file):
                return None
            columns: dict[str, Any] = {name: arrays[name] for name in ARRAYS}
            columns |= {name: json.loads(arrays[name].tobytes()) for name in TEXTS}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    return Columns(**columns, segmentations=(), is_valid=True)


def _narrow(values: Integers) -> Integers:
    """Return integers in the smallest type that holds them."""
    lower, upper = int(values.min()), int(values.max())
    dtype = next(t for t in INTEGER_TYPES if np.iinfo(t).min <= lower and upper <= np.iinfo(t).max)
    return values.astype(dtype)


if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(main(sys.argv[1:]))
