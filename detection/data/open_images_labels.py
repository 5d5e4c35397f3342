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

ID_COLUMN, LABEL_COLUMN = "ImageID", "LabelName"
EDGE_COLUMNS = ("XMin", "XMax", "YMin", "YMax")
FLAGS = ("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside")
IMAGES_PER_BLOCK = 10_000


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


def write_coco(
    path: Path,
    info: Mapping[str, Any],
    names: Sequence[str],
    image_ids: NDArray[np.uint64],
    sizes_wh: NDArray[np.int64],
    boxes: Boxes,
) -> None:
    """Write an annotation file: images in the order of image_ids (N,), ascending, and their boxes.

    sizes_wh: (N, 2) pixels. boxes: of these images only. `info` comes first, where `read_info` finds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    categories = [{"id": i, "name": name, "supercategory": None} for i, name in enumerate(names)]
    images = (
        {"id": i, "file_name": f"{format_id(key)}.jpg", "height": h, "width": w, "license": None, "coco_url": None}
        for i, (key, (w, h)) in enumerate(zip(image_ids.tolist(), sizes_wh.tolist(), strict=True), start=1)
    )
    with atomic_file.atomic_write(path) as partial, partial.open("wb") as file:
        file.write(b'{"info":' + msgspec.json.encode(dict(info)) + b',"licenses":[],"categories":')
        _write_list(file, categories)
        file.write(b',"images":')
        _write_list(file, images)
        file.write(b',"annotations":')
        _write_list(file, _annotations(image_ids, sizes_wh, boxes))
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


def _annotations(
    image_ids: NDArray[np.uint64], sizes_wh: NDArray[np.int64], boxes: Boxes
) -> Iterator[dict[str, object]]:
    """Yield the rows of the boxes. Blocks bound the memory that numbers of Python take."""
    annotation_id = 0
    for block in range(0, len(image_ids), IMAGES_PER_BLOCK):
        block_ids = image_ids[block : block + IMAGES_PER_BLOCK]
        start = int(np.searchsorted(boxes.image_ids, block_ids[0], "left"))
        end = int(np.searchsorted(boxes.image_ids, block_ids[-1], "right"))
        index = block + np.searchsorted(block_ids, boxes.image_ids[start:end])
        left, right, top, bottom = boxes.edges[start:end].T
        width, height = sizes_wh[index].T
        boxes_xywh = np.stack([left * width, top * height, (right - left) * width, (bottom - top) * height], axis=1)
        for image_index, category_id, bbox, flags in zip(
            index.tolist(),
            boxes.category_ids[start:end].tolist(),
            boxes_xywh.tolist(),
            boxes.flags[start:end].tolist(),
            strict=True,
        ):
            annotation_id += 1
            named_flags = dict(zip(FLAGS, flags, strict=True))
            yield {
                "id": annotation_id,
                "image_id": image_index + 1,
                "category_id": category_id,
                "bbox": bbox,
                "area": bbox[2] * bbox[3],
                "iscrowd": int(named_flags["IsGroupOf"]),
                **named_flags,
            }


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
