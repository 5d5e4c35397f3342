"""Reader of COCO annotation files into columns, with a list of all errors in a file.

Format: https://cocodataset.org/#format-data (object detection).
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from detection.config.settings import InputError
from detection.data.file_content import describe_other_content

JPEG_MAX_SIDE_PX = 65_535

RECREATE_HINT = "Recreate the file"

INTEGER: dict[type, str] = {int: "an integer", bool: "an integer"}
NUMBER: dict[type, str] = {int: "a number", float: "a number"}
TEXT: dict[type, str] = {str: "text"}

Integers = NDArray[np.signedinteger[Any]]

MISSING = -(2**63)
"""Integer in place of a missing one."""


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns of an annotation file: types checked, values not yet validated unless `is_valid`."""

    image_ids: Integers
    file_names: list[str]
    sizes_hw: Integers
    category_ids: Integers
    category_names: list[str]
    annotation_ids: Integers
    box_image_ids: Integers
    box_category_ids: Integers
    boxes_xywh: NDArray[np.float64]
    areas: NDArray[np.float64]
    is_crowd: Integers
    segmentations: Sequence[Any]
    """Per box: undecoded JSON, decoded JSON or None. Empty unless requested."""
    is_valid: bool = False
    """True if `validate` has found no errors before."""
    remarks: list[str] = field(default_factory=list)
    """Missing fields, and what they were filled with."""


def read(annotation_file: Path, segmentations: bool = False, *, allow_unlabeled: bool = False) -> Columns:
    """Read the columns of an annotation file, including the masks with `segmentations`.

    allow_unlabeled: accept a file with images and categories only.

    Missing fields that have a default are filled: annotation ids, crowd flags (0) and areas (width × height of the
    box). A missing width or height of an image stays `MISSING`. Raises InputError if the file is unreadable, is not an
    annotation file, or has values of the wrong type.
    """
    data = read_utf8(annotation_file)
    columns = _parse_typed(data, segmentations, allow_unlabeled)
    return _fill_missing(columns or _parse_untyped(annotation_file, data, segmentations))


def read_utf8(path: Path) -> bytes:
    """Return the UTF-8 text of a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises InputError if it is unreadable. UTF-8 is not verified.
    """
    try:
        data = path.read_bytes()
        encoding = json.detect_encoding(data)
        return data if encoding == "utf-8" else data.decode(encoding).encode()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}. {RECREATE_HINT}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}{_describe_json_error(data, error)}") from None


def _fill_missing(columns: Columns) -> Columns:
    """Fill fields that have a default. Return the columns unchanged if none is missing."""
    remarks = []

    def is_missing(name: str, missing: NDArray[np.bool_], default: str) -> NDArray[np.bool_]:
        if missing.any():
            remarks.append(f"{missing.sum()} of {len(missing)} annotations have no '{name}': {default}")
        return missing

    ids, areas, is_crowd = columns.annotation_ids, columns.areas, columns.is_crowd
    if is_missing("id", ids == MISSING, "numbered").any():
        ids = np.where(ids == MISSING, max(0, ids.max()) + np.arange(1, len(ids) + 1), ids)
    if is_missing("area", np.isnan(areas), "width × height of the box").any():
        areas = np.where(np.isnan(areas), columns.boxes_xywh[:, 2:].prod(axis=1), areas)
    if is_missing("iscrowd", is_crowd == MISSING, "0").any():
        is_crowd = np.where(is_crowd == MISSING, 0, is_crowd)
    if not remarks:
        return columns
    return replace(columns, annotation_ids=ids, areas=areas, is_crowd=is_crowd, remarks=remarks)


def read_categories(annotation_file: Path) -> list[tuple[int, str]]:
    """Read only the category ids and names of an annotation file, in file order.

    Raises InputError if the file is unreadable or not an annotation file.
    """
    try:
        rows = msgspec.json.decode(read_utf8(annotation_file), type=_Categories).categories
        return [(row.id, row.name) for row in rows]
    except (msgspec.DecodeError, RecursionError, UnicodeError):  # `read` reports the error
        columns = read(annotation_file)
        return list(zip(columns.category_ids.tolist(), columns.category_names, strict=True))


class _ImageRow(msgspec.Struct, gc=False):
    id: int
    file_name: str
    height: int = MISSING
    width: int = MISSING


class _AnnotationRow(msgspec.Struct, gc=False, kw_only=True):
    id: int = MISSING
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: int = MISSING
    area: float = math.nan


class _MaskRow(_AnnotationRow, gc=False, kw_only=True):
    segmentation: msgspec.Raw  # decoding all masks at once takes gigabytes of memory


class _CategoryRow(msgspec.Struct, gc=False):
    id: int
    name: str


class _Categories(msgspec.Struct, gc=False):
    categories: list[_CategoryRow]


class _File(msgspec.Struct, gc=False, kw_only=True):
    images: list[_ImageRow]
    annotations: list[_AnnotationRow] = []
    categories: list[_CategoryRow]


class _MaskFile(msgspec.Struct, gc=False, kw_only=True):
    images: list[_ImageRow]
    annotations: list[_MaskRow] = []
    categories: list[_CategoryRow]


def _parse_typed(data: bytes, segmentations: bool, allow_unlabeled: bool) -> Columns | None:
    """Parse a valid file. Return None for any other, which `_parse_untyped` reports.

    Five times as fast as an untyped JSON reader, because it skips the polygons, most of the file.
    """
    try:
        content = msgspec.json.decode(data, type=_MaskFile) if segmentations else msgspec.json.decode(data, type=_File)
        images, categories, rows = content.images, content.categories, content.annotations
        if not (images and categories and (rows or allow_unlabeled)):
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
            areas=np.fromiter((row.area for row in rows), np.float64, len(rows)),
            is_crowd=integers((row.iscrowd for row in rows), len(rows)),
            segmentations=[row.segmentation for row in rows if isinstance(row, _MaskRow)] if segmentations else (),
        )
    except (msgspec.DecodeError, OverflowError, RecursionError, UnicodeError):
        return None


def _parse_untyped(annotation_file: Path, data: bytes, segmentations: bool) -> Columns:
    content = _load_json(annotation_file, data, segmentations)
    errors: list[str] = []
    images = _Table("images", content, errors)
    categories = _Table("categories", content, errors)
    annotations = _Table("annotations", content, errors)
    heights, widths = images.integers("height", MISSING), images.integers("width", MISSING)
    columns = Columns(
        image_ids=images.integers("id"),
        file_names=images.values("file_name", TEXT),
        sizes_hw=np.stack([heights, widths], axis=1) if len(heights) == len(widths) else np.empty((0, 2), np.int64),
        category_ids=categories.integers("id"),
        category_names=categories.values("name", TEXT),
        annotation_ids=annotations.integers("id", MISSING),
        box_image_ids=annotations.integers("image_id"),
        box_category_ids=annotations.integers("category_id"),
        boxes_xywh=annotations.boxes("bbox"),
        areas=np.array(annotations.values("area", NUMBER, math.nan), np.float64),
        is_crowd=annotations.integers("iscrowd", MISSING),
        segmentations=[row.get("segmentation") for row in annotations.rows] if segmentations else (),
    )
    raise_if_any(annotation_file, errors)
    return columns


def validate(columns: Columns, *, allow_outside: bool = False) -> list[str]:
    """Return the errors in the columns, one line per kind with its count and first row."""
    errors: list[str] = []
    if columns.is_valid:
        return errors

    def report(invalid: NDArray[np.bool_], message: str, describe: Callable[[int], object]) -> None:
        if count := int(invalid.sum()):
            errors.append(f"{message}: {count} of {len(invalid)} (first: {describe(int(invalid.argmax()))})")

    def describe_box(row: int) -> str:
        return (
            f"annotation {columns.annotation_ids[row]}, image_id {columns.box_image_ids[row]}, "
            f"category_id {columns.box_category_ids[row]}, bbox {columns.boxes_xywh[row].tolist()}"
        )

    report(_is_duplicate(columns.image_ids), "images with a duplicate id", lambda i: columns.image_ids[i])
    report(_is_duplicate(columns.category_ids), "categories with a duplicate id", lambda i: columns.category_ids[i])
    report(
        _is_duplicate(columns.annotation_ids), "annotations with a duplicate id", lambda i: columns.annotation_ids[i]
    )
    sizes_hw = columns.sizes_hw
    report(
        np.any((sizes_hw < 1) | (sizes_hw > JPEG_MAX_SIDE_PX), axis=1),
        f"images with a width or height outside 1 to {JPEG_MAX_SIDE_PX}",
        lambda i: f"image {columns.image_ids[i]}, {sizes_hw[i, 1]}×{sizes_hw[i, 0]}",
    )
    box_image, has_image = lookup(columns.box_image_ids, columns.image_ids)
    _, has_category = lookup(columns.box_category_ids, columns.category_ids)
    report(~has_image, "boxes with an unknown image_id", describe_box)
    report(~has_category, "boxes with an unknown category_id", describe_box)

    sizes_wh = columns.boxes_xywh[:, 2:]
    finite = np.all(np.isfinite(columns.boxes_xywh), axis=1)
    negative = finite & np.any(sizes_wh < 0, axis=1)
    boxes_xyxy = to_xyxy(np.where(finite[:, None], columns.boxes_xywh, 0))
    outside = (boxes_xyxy[:, 2:] <= 0) | (boxes_xyxy[:, :2] >= sizes_hw[box_image, ::-1])
    report(~finite, "boxes with NaN or infinity", describe_box)
    report(negative, "boxes with a negative width or height", describe_box)
    if not allow_outside:
        report(
            np.any(outside, axis=1) & np.all(sizes_wh > 0, axis=1) & finite & has_image,
            "boxes entirely outside their image",
            describe_box,
        )
    return errors


def raise_if_any(annotation_file: Path, errors: list[str]) -> None:
    """Raise InputError with all errors of a file, if any."""
    if len(errors) == 1:
        raise InputError(f"{annotation_file}: {errors[0]}.")
    if errors:
        raise InputError("\n".join([f"{annotation_file}: {len(errors)} errors:", *(f"  {e}." for e in errors)]))


def _describe_json_error(data: bytes, error: Exception) -> str:
    """Return the text that follows the name of an unreadable file: a position, the problem and what to do."""
    if content := describe_other_content(data):
        return f": {content}, not JSON. {RECREATE_HINT}."
    if isinstance(error, json.JSONDecodeError):
        return f", line {error.lineno}, column {error.colno}: broken JSON: {error.msg}. {RECREATE_HINT}."
    hint = "Save it in UTF-8" if isinstance(error, UnicodeDecodeError) else RECREATE_HINT
    return f": broken JSON: {error}. {hint}."


def _load_json(annotation_file: Path, data: bytes, segmentations: bool) -> dict[str, Any]:
    def drop_segmentation(row: dict[str, Any]) -> dict[str, Any]:
        row.pop("segmentation", None)  # COCO's polygons take gigabytes of memory
        return row

    try:
        content = json.loads(data.decode(), object_hook=None if segmentations else drop_segmentation)
    except (ValueError, RecursionError) as error:  # also a number of 5000 digits, too deeply nested lists
        raise InputError(f"{annotation_file}{_describe_json_error(data, error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{annotation_file}: not a COCO annotation file: expected a JSON object. {RECREATE_HINT}.")
    return content


class _Table:
    """One list of the annotation file, read by columns.

    An invalid column adds a message to `errors` and is returned empty. Check `errors` before using a column.
    """

    def __init__(self, name: str, content: dict[str, Any], errors: list[str]) -> None:
        self.name, self.errors = name, errors
        self.rows: list[Any] = []
        rows = content.get(name)
        if not isinstance(rows, list) or not rows:
            errors.append(f"'{name}' is {'missing' if rows is None else 'not a list' if rows else 'empty'}")
        elif set(map(type, rows)) != {dict}:
            self._report("are not JSON objects", [type(row) is not dict for row in rows])
        else:
            self.rows = rows

    def values(self, key: str, types: Mapping[type, str], default: Any = None) -> list[Any]:
        """Return the value of `key` in each row, each of one of `types`. A default replaces missing and null values."""
        try:
            values = [
                row[key] if default is None else default if row.get(key) is None else row[key] for row in self.rows
            ]
        except KeyError:
            return self._report(f"have no '{key}'", [key not in row for row in self.rows])
        if not set(map(type, values)) <= types.keys():
            expected = next(iter(types.values()))
            return self._report(f"have a '{key}' that is not {expected}", [type(v) not in types for v in values])
        return values

    def integers(self, key: str, default: int | None = None) -> NDArray[np.int64]:
        """Return the integers of `key`: (rows,)."""
        values = self.values(key, INTEGER, default)
        try:
            return np.array(values, dtype=np.int64)
        except OverflowError:
            self._report(f"have a '{key}' of more than 64 bits", [v.bit_length() > 63 for v in values])
            return np.empty(0, dtype=np.int64)

    def boxes(self, key: str) -> NDArray[np.float64]:
        """Return the boxes of `key`: (rows, 4)."""
        values = self.values(key, {list: "a list"})
        numbers = set(map(type, chain.from_iterable(values)))
        if not (set(map(len, values)) <= {4} and numbers <= NUMBER.keys()):
            invalid = [len(v) != 4 or any(type(number) not in NUMBER for number in v) for v in values]
            values = self._report(f"have a '{key}' that is not 4 numbers", invalid)
        try:
            return np.fromiter(chain.from_iterable(values), np.float64).reshape(-1, 4)
        except OverflowError:
            self._report(f"have a '{key}' of more than 64 bits", [max(map(abs, v)) > 2**63 for v in values])
            return np.empty((0, 4))

    def _report(self, problem: str, invalid: list[bool]) -> list[Any]:
        first = f"{self.name}[{invalid.index(True)}]"
        self.errors.append(f"{sum(invalid)} of {len(invalid)} {self.name} {problem} (first: {first})")
        return []


def lookup(keys: Integers, ids: Integers) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the index in `ids` of each key, and whether the key exists. The index of an unknown key is arbitrary."""
    order = np.argsort(ids)
    index = order[np.searchsorted(ids, keys, sorter=order).clip(max=len(ids) - 1)]
    return index, ids[index] == keys


def _is_duplicate(ids: Integers) -> NDArray[np.bool_]:
    """Return True for each id that also occurs in an earlier row."""
    duplicate = np.ones(len(ids), dtype=bool)
    duplicate[np.unique(ids, return_index=True)[1]] = False
    return duplicate


def to_xyxy(boxes_xywh: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Convert boxes (M, 4) from xywh to xyxy, in the same precision."""
    return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)
