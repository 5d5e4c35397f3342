"""Open Images' box annotations (CSV) to COCO format, as fiftyone 0.15.1 converts them for MLPerf's RetinaNet.

Format of the CSV files: https://storage.googleapis.com/openimages/web/download_v7.html#df-bbox-csv.
"""

import csv
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from detection import atomic_file
from detection.config.settings import InputError
from detection.data.coco_json import Columns

ID_COLUMN, LABEL_COLUMN = "ImageID", "LabelName"
EDGE_COLUMNS = ("XMin", "XMax", "YMin", "YMax")
FLAGS = ("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside")
BOXES_PER_BLOCK = 100_000


@dataclass(frozen=True, eq=False)
class Boxes:
    """Boxes of one split, in the order of their image ids and of the file within an image.

    An image id of 16 hexadecimal digits is a 64-bit number here: their orders are the same.
    """

    image_ids: NDArray[np.uint64]
    """(M,)"""
    category_ids: NDArray[np.int16]
    """(M,)"""
    edges: NDArray[np.float64]
    """(M, 4) XMin, XMax, YMin, YMax as fractions of the image."""
    flags: NDArray[np.bool_]
    """(M, 5) in the order of `FLAGS`. As in fiftyone, -1 (unknown) is true."""

    def select(self, image_ids: NDArray[np.uint64]) -> "Boxes":
        """Return the boxes of these images."""
        kept = np.isin(self.image_ids, image_ids)
        return Boxes(self.image_ids[kept], self.category_ids[kept], self.edges[kept], self.flags[kept])


def format_id(image_id: int) -> str:
    """Return an image id as in the files."""
    return f"{image_id:016x}"


def read_category_ids(path: Path, names: Sequence[str]) -> dict[str, int]:
    """Read the label (MID) of each class name, and return the category id of each label: 0 for the first name.

    Raises InputError if the file lacks a name.
    """
    with path.open(newline="", encoding="utf-8") as file:
        labels = {row[1]: row[0] for row in csv.reader(file) if len(row) == 2}
    if absent := [name for name in names if name not in labels]:
        raise InputError(f"{path}: {len(absent)} classes are missing, first {absent[0]}. Remove it and run this again.")
    return {labels[name]: category_id for category_id, name in enumerate(names)}


def read_image_ids(path: Path) -> NDArray[np.uint64]:
    """Read the ids of a list of images: (N,). Raises InputError with the line of an invalid one."""
    with _open_rows(path, (ID_COLUMN,)) as rows:
        return np.fromiter(map(_parse_id, rows), np.uint64)


def read_boxes(path: Path, category_ids: Mapping[str, int]) -> Boxes:
    """Read the boxes of these labels. Rows of other labels take no memory.

    Raises InputError with the line of an invalid one.
    """
    ids, categories, edges, flags = array("Q"), array("h"), array("d"), array("b")
    text, image_id = "", 0
    with _open_rows(path, (ID_COLUMN, LABEL_COLUMN, *EDGE_COLUMNS, *FLAGS)) as rows:
        for row in rows:
            category_id = category_ids.get(row[1])
            if category_id is None:
                continue
            if row[0] != text:
                text, image_id = row[0], _parse_id(row[0])
            ids.append(image_id)
            categories.append(category_id)
            edges.extend(map(float, row[2:6]))
            flags.extend(map(int, row[6:]))
    image_ids = np.asarray(ids)  # a view, as those below: the training split has millions of boxes
    order = np.argsort(image_ids, kind="stable")
    return Boxes(
        image_ids[order],
        np.asarray(categories)[order],
        np.asarray(edges).reshape(-1, len(EDGE_COLUMNS))[order],
        np.asarray(flags).reshape(-1, len(FLAGS))[order] != 0,
    )


def make_columns(
    names: Sequence[str], image_ids: NDArray[np.uint64], sizes_wh: NDArray[np.int64], boxes: Boxes
) -> Columns:
    """Return the columns of an annotation file: images in the order of image_ids (N,), ascending, and their boxes.

    sizes_wh: (N, 2) pixels. boxes: of these images only.
    """
    image_index = np.searchsorted(image_ids, boxes.image_ids)
    left, right, top, bottom = boxes.edges.T
    width, height = sizes_wh[image_index].T
    boxes_xywh = np.stack([left * width, top * height, (right - left) * width, (bottom - top) * height], axis=1)
    return Columns(
        image_ids=np.arange(1, 1 + len(image_ids)),
        file_names=[f"{format_id(key)}.jpg" for key in image_ids.tolist()],
        sizes_hw=sizes_wh[:, ::-1],
        category_ids=np.arange(len(names)),
        category_names=list(names),
        annotation_ids=np.arange(1, 1 + len(boxes_xywh)),
        box_image_ids=1 + image_index,
        box_category_ids=boxes.category_ids,
        boxes_xywh=boxes_xywh,
        areas=boxes_xywh[:, 2] * boxes_xywh[:, 3],
        is_crowd=boxes.flags[:, FLAGS.index("IsGroupOf")].astype(np.int64),
        segmentations=(),
    )


def write_coco(path: Path, info: Mapping[str, Any], columns: Columns, flags: NDArray[np.bool_]) -> None:
    """Write an annotation file. `info` comes first, where `read_info` finds it. flags: (M, 5) as in `Boxes`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    categories = (
        {"id": i, "name": name, "supercategory": None}
        for i, name in zip(columns.category_ids.tolist(), columns.category_names, strict=True)
    )
    images = (
        {"id": i, "file_name": name, "height": height, "width": width, "license": None, "coco_url": None}
        for i, name, (height, width) in zip(
            columns.image_ids.tolist(), columns.file_names, columns.sizes_hw.tolist(), strict=True
        )
    )
    with atomic_file.atomic_write(path) as partial, partial.open("wb") as file:
        file.write(b'{"info":' + msgspec.json.encode(dict(info)) + b',"licenses":[],"categories":')
        _write_list(file, categories)
        file.write(b',"images":')
        _write_list(file, images)
        file.write(b',"annotations":')
        _write_list(file, _annotations(columns, flags))
        file.write(b"}\n")


def read_info(path: Path) -> dict[str, Any]:
    """Return the `info` of a file of `write_coco`, from its first bytes. Return {} for any other file."""
    with path.open("rb") as file:
        head = file.read(4096).decode(errors="replace")
    prefix = '{"info":'
    end = head.find("}") + 1
    try:
        info = msgspec.json.decode(head[len(prefix) : end]) if head.startswith(prefix) else {}
    except msgspec.DecodeError:
        return {}
    return info if isinstance(info, dict) else {}


def _annotations(columns: Columns, flags: NDArray[np.bool_]) -> Iterator[dict[str, object]]:
    """Yield the rows of the boxes. Blocks bound the memory that numbers of Python take."""
    arrays: list[NDArray[Any]] = [columns.annotation_ids, columns.box_image_ids, columns.box_category_ids]
    arrays += [columns.boxes_xywh, columns.areas, columns.is_crowd, flags]
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    for start in range(0, len(flags), BOXES_PER_BLOCK):
        for *values, box_flags in zip(*(a[start : start + BOXES_PER_BLOCK].tolist() for a in arrays), strict=True):
            yield dict(zip(keys, values, strict=True)) | dict(zip(FLAGS, box_flags, strict=True))


def _write_list(file: BinaryIO, rows: Iterable[object]) -> None:
    encoder = msgspec.json.Encoder()
    separator = b"["
    for row in rows:
        file.write(separator + encoder.encode(row))
        separator = b",\n"
    file.write(b"]" if separator == b",\n" else b"[]")


@contextmanager
def _open_rows(path: Path, columns: tuple[str, ...]) -> Iterator[Iterator[Any]]:
    """Yield an iterator over these columns: a tuple per row, or the text of a single column.

    Raises InputError if a column is missing, and converts a ValueError of the caller to one with the line.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if absent := [name for name in columns if name not in header]:
            raise InputError(f"{path}: it has no column {absent[0]}. Remove it and run this again.")
        try:
            yield map(itemgetter(*map(header.index, columns)), reader)
        except IndexError:
            problem = "a column is missing"
        except (ValueError, OverflowError, csv.Error) as error:
            problem = str(error)
        else:
            return
        raise InputError(f"{path}, line {reader.line_num}: {problem}. Remove it and run this again.")


def _parse_id(text: str) -> int:
    image_id = int(text, 16)
    if format_id(image_id) != text:
        raise ValueError(f"'{text}' is not an image id")
    return image_id
