"""A COCO annotation file by columns, with every mistake in it named.

Format: https://cocodataset.org/#format-data (object detection).
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from detection.config.settings import InputError

JPEG_MAX_SIDE_PX = 65_535

AGAIN = "Run ./init_datasets.sh, or write the file again"

INTEGER: dict[type, str] = {int: "a whole number", bool: "a whole number"}
NUMBER: dict[type, str] = {int: "a number", float: "a number"}
TEXT: dict[type, str] = {str: "text"}


@dataclass(frozen=True, eq=False)
class Columns:
    """An annotation file by columns, of the right types but not yet checked against each other."""

    image_ids: NDArray[np.int64]
    file_names: list[str]
    sizes_hw: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    category_names: list[str]
    annotation_ids: NDArray[np.int64]
    box_image_ids: NDArray[np.int64]
    box_category_ids: NDArray[np.int64]
    boxes_xywh: NDArray[np.float64]
    crowd: NDArray[np.int64]
    segmentations: Sequence[Any]
    """Of each box: its JSON, still to be decoded, or what it holds, or None; empty where none are asked for."""


def read(annotation_file: Path, segmentations: bool = False) -> Columns:
    """The columns of an annotation file, masks among them with `segmentations`.

    Raises InputError where the file cannot be read, is none, or has values of another type.
    """
    try:
        text = annotation_file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{annotation_file}: cannot be read: {error.strerror}. {AGAIN}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{annotation_file}: broken JSON: {error}. {AGAIN}.") from None
    return _typed_columns(text, segmentations) or _checked_columns(annotation_file, text, segmentations)


def read_categories(annotation_file: Path) -> list[tuple[int, str]]:
    """The ids and names of an annotation file's categories alone, as they come.

    Raises InputError where the file cannot be read or is none.
    """
    try:
        rows = msgspec.json.decode(annotation_file.read_bytes(), type=_Categories).categories
        return [(row.id, row.name) for row in rows]
    except (OSError, msgspec.DecodeError, RecursionError):  # which the checks of the whole file explain
        columns = read(annotation_file)
        return list(zip(columns.category_ids.tolist(), columns.category_names, strict=True))


class _ImageRow(msgspec.Struct, gc=False):
    id: int
    file_name: str
    height: int
    width: int


class _AnnotationRow(msgspec.Struct, gc=False):
    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: int
    area: float  # unused here, but its lack would end the first evaluation, hours later


class _MaskRow(_AnnotationRow, gc=False):
    segmentation: msgspec.Raw  # its decoded numbers, all at once, would take gigabytes of memory


class _CategoryRow(msgspec.Struct, gc=False):
    id: int
    name: str


class _Categories(msgspec.Struct, gc=False):
    categories: list[_CategoryRow]


class _File(msgspec.Struct, gc=False):
    images: list[_ImageRow]
    annotations: list[_AnnotationRow]
    categories: list[_CategoryRow]


class _MaskFile(msgspec.Struct, gc=False):
    images: list[_ImageRow]
    annotations: list[_MaskRow]
    categories: list[_CategoryRow]


def _typed_columns(text: str, segmentations: bool) -> Columns | None:
    """The columns of a file that is as it should be; None where it is not, which `_checked_columns` explains.

    Five times as fast as a JSON reader without types, since polygons, most of the file, are passed over.
    """
    try:
        content = msgspec.json.decode(text, type=_MaskFile) if segmentations else msgspec.json.decode(text, type=_File)
        images, categories, rows = content.images, content.categories, content.annotations
        if not (images and categories and rows):
            return None

        def integers(values: Iterable[int], count: int) -> NDArray[np.int64]:
            return np.fromiter(values, np.int64, count)

        return Columns(
            image_ids=integers((row.id for row in images), len(images)),
            file_names=[row.file_name for row in images],
            sizes_hw=np.array([(row.height, row.width) for row in images], dtype=np.int64),
            category_ids=integers((row.id for row in categories), len(categories)),
            category_names=[row.name for row in categories],
            annotation_ids=integers((row.id for row in rows), len(rows)),
            box_image_ids=integers((row.image_id for row in rows), len(rows)),
            box_category_ids=integers((row.category_id for row in rows), len(rows)),
            boxes_xywh=np.fromiter(chain.from_iterable(row.bbox for row in rows), np.float64, 4 * len(rows)).reshape(
                -1, 4
            ),
            crowd=integers((row.iscrowd for row in rows), len(rows)),
            segmentations=[row.segmentation for row in rows if isinstance(row, _MaskRow)] if segmentations else (),
        )
    except (msgspec.DecodeError, OverflowError, RecursionError, UnicodeError):
        return None


def _checked_columns(annotation_file: Path, text: str, segmentations: bool) -> Columns:
    content = _parse(annotation_file, text, segmentations)
    problems: list[str] = []
    images = _Table("images", content, problems)
    categories = _Table("categories", content, problems)
    annotations = _Table("annotations", content, problems)
    annotations.values("area", NUMBER)  # unused here, but its lack would end the first evaluation, hours later
    heights, widths = images.integers("height"), images.integers("width")
    columns = Columns(
        image_ids=images.integers("id"),
        file_names=images.values("file_name", TEXT),
        sizes_hw=np.stack([heights, widths], axis=1) if len(heights) == len(widths) else np.empty((0, 2), np.int64),
        category_ids=categories.integers("id"),
        category_names=categories.values("name", TEXT),
        annotation_ids=annotations.integers("id"),
        box_image_ids=annotations.integers("image_id"),
        box_category_ids=annotations.integers("category_id"),
        boxes_xywh=annotations.boxes("bbox"),
        crowd=annotations.integers("iscrowd"),
        segmentations=[row.get("segmentation") for row in annotations.rows] if segmentations else (),
    )
    refuse(annotation_file, problems)
    return columns


def mistakes(columns: Columns) -> list[str]:
    """What is wrong between the columns: one line for each kind, with its count and its first row."""
    problems: list[str] = []

    def report(wrong: NDArray[np.bool_], what: str, example: Callable[[int], object]) -> None:
        if count := int(wrong.sum()):
            problems.append(f"{what}: {count} of {len(wrong)} (first: {example(int(wrong.argmax()))})")

    def box(row: int) -> str:
        return (
            f"annotation {columns.annotation_ids[row]}, image_id {columns.box_image_ids[row]}, "
            f"category_id {columns.box_category_ids[row]}, bbox {columns.boxes_xywh[row].tolist()}"
        )

    report(_repeated(columns.image_ids), "images whose id is taken", lambda i: columns.image_ids[i])
    report(_repeated(columns.category_ids), "categories whose id is taken", lambda i: columns.category_ids[i])
    report(
        _repeated(columns.annotation_ids),
        "annotations whose id is taken",
        lambda i: columns.annotation_ids[i],
    )
    sizes_hw = columns.sizes_hw
    report(
        np.any((sizes_hw < 1) | (sizes_hw > JPEG_MAX_SIDE_PX), axis=1),
        f"images with a width or height not in 1 to {JPEG_MAX_SIDE_PX}",
        lambda i: f"image {columns.image_ids[i]}, {sizes_hw[i, 1]}×{sizes_hw[i, 0]}",
    )
    box_image, image_known = find(columns.box_image_ids, columns.image_ids)
    _, category_known = find(columns.box_category_ids, columns.category_ids)
    report(~image_known, "boxes with an unknown image_id", box)
    report(~category_known, "boxes with an unknown category_id", box)

    extents_wh = columns.boxes_xywh[:, 2:]
    finite = np.all(np.isfinite(columns.boxes_xywh), axis=1)
    negative = finite & np.any(extents_wh < 0, axis=1)
    boxes_xyxy = to_xyxy(np.where(finite[:, None], columns.boxes_xywh, 0))
    beyond = (boxes_xyxy[:, 2:] <= 0) | (boxes_xyxy[:, :2] >= sizes_hw[box_image, ::-1])
    report(~finite, "boxes with NaN or infinity", box)
    report(negative, "boxes with a negative width or height", box)
    report(
        np.any(beyond, axis=1) & np.all(extents_wh > 0, axis=1) & finite & image_known,
        "boxes wholly outside their image",
        box,
    )
    return problems


def refuse(annotation_file: Path, problems: list[str]) -> None:
    """Raise InputError that names all of these problems of a file; none, where there is none."""
    if len(problems) == 1:
        raise InputError(f"{annotation_file}: {problems[0]}.")
    if problems:
        raise InputError("\n".join([f"{annotation_file}: {len(problems)} mistakes:", *(f"  {p}." for p in problems)]))


def _parse(annotation_file: Path, text: str, segmentations: bool) -> dict[str, Any]:
    def without_polygons(row: dict[str, Any]) -> dict[str, Any]:
        row.pop("segmentation", None)  # most of the file: kept, COCO's polygons would take gigabytes of memory
        return row

    try:
        content = json.loads(text, object_hook=None if segmentations else without_polygons)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{annotation_file}, {where}: broken JSON: {error.msg}. {AGAIN}.") from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, lists without end
        raise InputError(f"{annotation_file}: broken JSON: {error}. {AGAIN}.") from None
    if not isinstance(content, dict):
        raise InputError(f"{annotation_file}: no COCO annotation file: a JSON object is expected. {AGAIN}.")
    return content


class _Table:
    """One list of the annotation file, read by columns.

    What is wrong with a column goes to `problems`, and the column comes back empty: look there before use.
    """

    def __init__(self, name: str, content: dict[str, Any], problems: list[str]) -> None:
        self.name, self.problems = name, problems
        self.rows: list[Any] = []
        rows = content.get(name)
        if not isinstance(rows, list) or not rows:
            problems.append(f"'{name}' is {'missing' if rows is None else 'no list' if rows else 'empty'}")
        elif set(map(type, rows)) != {dict}:
            self._report("are no JSON objects", [type(row) is not dict for row in rows])
        else:
            self.rows = rows

    def values(self, key: str, types: Mapping[type, str]) -> list[Any]:
        """The value of `key` in each row, every one of these types."""
        try:
            values = [row[key] for row in self.rows]
        except KeyError:
            return self._report(f"have no '{key}'", [key not in row for row in self.rows])
        if not set(map(type, values)) <= types.keys():
            expected = next(iter(types.values()))
            return self._report(f"have a '{key}' that is not {expected}", [type(v) not in types for v in values])
        return values

    def integers(self, key: str) -> NDArray[np.int64]:
        """(rows,)."""
        values = self.values(key, INTEGER)
        try:
            return np.array(values, dtype=np.int64)
        except OverflowError:
            self._report(f"have a '{key}' of more than 64 bits", [v.bit_length() > 63 for v in values])
            return np.empty(0, dtype=np.int64)

    def boxes(self, key: str) -> NDArray[np.float64]:
        """(rows, 4)."""
        values = self.values(key, {list: "a list"})
        numbers = set(map(type, chain.from_iterable(values)))
        if not (set(map(len, values)) <= {4} and numbers <= NUMBER.keys()):
            wrong = [len(v) != 4 or any(type(number) not in NUMBER for number in v) for v in values]
            values = self._report(f"have a '{key}' that is not 4 numbers", wrong)
        try:
            return np.fromiter(chain.from_iterable(values), np.float64).reshape(-1, 4)
        except OverflowError:
            self._report(f"have a '{key}' of more than 64 bits", [max(map(abs, v)) > 2**63 for v in values])
            return np.empty((0, 4))

    def _report(self, what: str, wrong: list[bool]) -> list[Any]:
        first = f"{self.name}[{wrong.index(True)}]"
        self.problems.append(f"{sum(wrong)} of {len(wrong)} {self.name} {what} (first: {first})")
        return []


def find(wanted: NDArray[np.int64], ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Index in `ids` of each wanted id, any index where there is none, and whether there is one."""
    order = np.argsort(ids)
    index = order[np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)]
    return index, ids[index] == wanted


def _repeated(ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which ids an earlier row has already."""
    repeated = np.ones(len(ids), dtype=bool)
    repeated[np.unique(ids, return_index=True)[1]] = False
    return repeated


def to_xyxy(boxes_xywh: NDArray[np.float64]) -> NDArray[np.float64]:
    """Boxes (M, 4) by their corners."""
    return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)
