"""One split of a COCO-format data set as flat arrays, checked before anything is trained on it.

Shapes: N images, M boxes, K classes with background (label 0), so K - 1 categories; L lines and P points of outlines.
Format: https://cocodataset.org/#format-data (object detection).
"""

import json
import math
import os
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, TypedDict

import msgspec
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_api

from detection.config import InputError
from detection.run_config import RunConfig

# COCO rounds x and width to 2 decimals each, so their sum is off by up to .01 pixels at the border.
BORDER_ROUNDING_PX = 0.02

JPEG_MAX_SIDE_PX = 65_535

AGAIN = "Run ./init_datasets.sh, or write the file again"

INTEGER: dict[type, str] = {int: "a whole number", bool: "a whole number"}
NUMBER: dict[type, str] = {int: "a number", float: "a number"}
TEXT: dict[type, str] = {str: "text"}


class CompressedMask(TypedDict):
    """The mask of an object as COCO's results format has it: `size` is height and width of the image."""

    size: list[int]
    counts: str


@dataclass(frozen=True)
class Category:
    """What one label stands for: `id` as in the annotation file, with its name."""

    id: int
    name: str


@dataclass(frozen=True, eq=False)
class Outlines:
    """The masks of M boxes as lines in the image: x, y in pixels, a pixel reaching from its number to the next.

    A line from a polygon ends where it begins, and has 4 points or more, turning either way round. Lines from run
    lengths have 2 points each, one above the other: left borders go down and right borders up.
    """

    line_starts: NDArray[np.int64]
    """(M + 1,): the lines of box i are line_starts[i] to line_starts[i + 1]; a crowd has none."""
    point_starts: NDArray[np.int64]
    """(L + 1,): the points of line i are point_starts[i] to point_starts[i + 1]."""
    points_xy: NDArray[np.float32]
    """(P, 2)."""


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a COCO-format data set as flat arrays, which forked data workers share."""

    annotation_file: Path
    image_folder: Path
    image_ids: NDArray[np.int64]
    """(N,) in the order of the annotation file."""
    file_names: NDArray[np.bytes_]
    """(N,) relative to image_folder. Bytes, since a list of str would be copied to every worker."""
    sizes_hw: NDArray[np.int32]
    """(N, 2) pixels, as the annotation file says."""
    box_starts: NDArray[np.int64]
    """(N + 1,): the boxes of image i are rows box_starts[i] to box_starts[i + 1]."""
    boxes_xyxy: NDArray[np.float32]
    """(M, 4) pixels, clipped to the image, none of them empty."""
    labels: NDArray[np.int64]
    """(M,) 1 to K - 1: categories[label - 1]."""
    crowd: NDArray[np.bool_]
    """(M,) whether the box stands for a group of objects."""
    categories: tuple[Category, ...]
    """K - 1 of them, in ascending order of their ids (COCO uses 80 of the ids 1 to 90)."""
    dropped_boxes: int
    """Boxes of zero width or height: they have no logarithm to learn. COCO itself holds a few."""
    clipped_boxes: int
    """Boxes that reached past the border by more than a rounding."""
    missing_images: int
    """Images without a file, left out together with their boxes."""
    outlines: Outlines | None = None
    """The masks of the boxes, where they were asked for."""

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_classes(self) -> int:
        """K: the categories and background."""
        return 1 + len(self.categories)

    def image_path(self, index: int) -> Path:
        """The file of image `index` (0 to N - 1)."""
        return self.image_folder / os.fsdecode(bytes(self.file_names[index]))

    def boxes(self, index: int) -> NDArray[np.float32]:
        """The boxes of image `index`: (G, 4) xyxy in pixels, a view."""
        return self.boxes_xyxy[self.box_starts[index] : self.box_starts[index + 1]]

    def image_labels(self, index: int) -> NDArray[np.int64]:
        """The labels of the boxes of image `index`: (G,), a view."""
        return self.labels[self.box_starts[index] : self.box_starts[index + 1]]

    def masks(self, index: int) -> list[CompressedMask | None]:
        """The masks of the boxes of image `index`, None where a box has none; the split was read with segmentations."""
        outlines = self.outlines
        assert outlines is not None, "the split was read without masks"
        height, width = self.sizes_hw[index].tolist()
        masks: list[CompressedMask | None] = []
        for box in range(*self.box_starts[index : index + 2].tolist()):
            first, last = outlines.line_starts[box : box + 2].tolist()
            ends = outlines.point_starts[first : last + 1].tolist()
            # To the decimals that float32 has blurred: pycocotools rounds fifths of a pixel, where many are ties.
            lines = [outlines.points_xy[start:end].astype(np.float64).round(3) for start, end in pairwise(ends)]
            masks.append(_filled(lines, (height, width)) if lines else None)
        return masks

    def with_boxes(self) -> "Split":
        """The images that have a box, a crowd's included: those that are trained on."""
        counts = np.diff(self.box_starts)
        keep = counts > 0
        return replace(
            self,
            image_ids=self.image_ids[keep],
            file_names=self.file_names[keep],
            sizes_hw=self.sizes_hw[keep],
            box_starts=_starts(counts[keep]),
        )

    def without_crowds(self) -> "Split":
        """The same images without the boxes that stand for groups of objects."""
        keep = ~self.crowd
        kept_before = _starts(keep.astype(np.int64))
        outlines = self.outlines
        if outlines:  # of which a crowd has none, so that all lines stay
            outlines = replace(outlines, line_starts=_starts(np.diff(outlines.line_starts)[keep]))
        return replace(
            self,
            box_starts=kept_before[self.box_starts],
            boxes_xyxy=self.boxes_xyxy[keep],
            labels=self.labels[keep],
            crowd=self.crowd[keep],
            outlines=outlines,
        )


def files(config: RunConfig, split: Literal["train", "val"], *, segmentations: bool = False) -> tuple[Path, Path]:
    """The annotation file and the image folder of a split: those that the settings name, else as DATADIR lies.

    segmentations: as of `layout`. Raises InputError if the folder of DATADIR, or what belongs in it, is not there.
    """
    annotations, images = getattr(config, f"{split}_annotations"), getattr(config, f"{split}_images")
    if annotations:
        return Path(annotations), Path(images)
    return layout(config.data_dir, split, segmentations=segmentations)


def layout(data_dir: Path, split: Literal["train", "val"], *, segmentations: bool = False) -> tuple[Path, Path]:
    """Find the annotation file and the image folder of a split in COCO 2017's layout.

    The shrunken annotations of prepare-json.py are taken for training where they are there, but for `segmentations`,
    which they lack.
    Raises InputError if the folder, the annotation file or the images are not there.
    """
    annotations, image_folder = data_dir / "annotations", data_dir / f"{split}2017"
    annotation_file = annotations / f"instances_{split}2017.json"
    shrunken = annotations / f"bbox_only_instances_{split}2017.json"
    if split == "train" and not segmentations and shrunken.is_file():
        annotation_file = shrunken
    what_to_do = (
        "Run ./init_datasets.sh to fetch COCO 2017, or set DATADIR to a folder that holds "
        f"annotations/instances_{split}2017.json and {split}2017/."
    )
    try:
        empty = not any(data_dir.iterdir())
    except OSError as error:
        raise InputError(f"DATADIR={data_dir}: {error.strerror}. {what_to_do}") from None
    if empty:
        raise InputError(f"DATADIR={data_dir}: the folder is empty. {what_to_do}")
    for path in (annotation_file, image_folder):
        if not path.exists():
            raise InputError(f"DATADIR={data_dir}: {path.relative_to(data_dir)} is missing. {what_to_do}")
    return annotation_file, image_folder


def read_categories(annotation_file: Path) -> tuple[Category, ...]:
    """The categories of an annotation file alone, in ascending order of their ids: label 1, 2, ...

    Raises InputError where the file cannot be read or is none.
    """
    try:
        rows = msgspec.json.decode(annotation_file.read_bytes(), type=_Categories).categories
        pairs = [(row.id, row.name) for row in rows]
    except (OSError, msgspec.DecodeError, RecursionError):  # which the checks of the whole file explain
        columns = _read_columns(annotation_file)
        pairs = list(zip(columns.category_ids.tolist(), columns.category_names, strict=True))
    return tuple(Category(*pair) for pair in sorted(pairs))


def check_classes(num_classes: int, split: Split) -> None:
    """Raise InputError where a number of classes is set, so not 0, that is not that of the annotations."""
    if num_classes in (0, split.num_classes):
        return
    raise InputError(
        f"{split.annotation_file} has {len(split.categories)} categories: with the background num_classes is "
        f"{split.num_classes}, not {num_classes}. Pass --num-classes {split.num_classes}, or, for data that "
        "are not COCO 2017, --dataset with a name of theirs"
    )


def read(
    annotation_file: Path, image_folder: Path, *, allow_missing: bool = False, segmentations: bool = False
) -> Split:
    """Read and check an annotation file against its folder of images.

    Boxes of zero width or height are dropped, boxes that reach past the border clipped; both are counted.
    Images without a file are an error, or are left out and counted with `allow_missing`. Masks are read and checked
    with `segmentations`: polygons, and run lengths plain or compressed.
    Raises InputError with all that is wrong. COCO's 860,001 training boxes take 6 s and 0.7 GiB at the peak
    when shrunken by prepare-json.py, 9 s and 1.1 GiB with their polygons (measured on one core).
    """
    columns = _read_columns(annotation_file, segmentations)
    present = _present(columns.file_names, image_folder)
    missing_images = len(present) - int(present.sum())

    problems = _mistakes(columns)
    if missing_images and not allow_missing:
        problems.insert(
            0,
            f"names {len(present)} images, {missing_images} of them are not in {image_folder.name}/ "
            f"(first: {columns.file_names[int(present.argmin())]}). Run ./init_datasets.sh, or pass "
            "--allow-missing to go on without them",
        )
    elif missing_images == len(present):
        problems.insert(0, f"none of its {len(present)} images is in {image_folder}. Run ./init_datasets.sh")
    _refuse(annotation_file, problems)

    box_image, _ = _find(columns.box_image_ids, columns.image_ids)
    category_order = np.argsort(columns.category_ids)
    label_less_one, _ = _find(columns.box_category_ids, columns.category_ids[category_order])

    boxes_xyxy = _to_xyxy(columns.boxes_xywh)
    inside_xyxy = np.clip(boxes_xyxy, 0, np.tile(columns.sizes_hw[box_image, ::-1], (1, 2)))
    past_border = np.any(np.abs(inside_xyxy - boxes_xyxy) > BORDER_ROUNDING_PX, axis=1)
    boxes_f32 = inside_xyxy.astype(np.float32)  # before the test for emptiness, which the rounding may cause
    empty = np.any(boxes_f32[:, 2:] <= boxes_f32[:, :2], axis=1)

    here = present[box_image]
    kept = np.flatnonzero(here & ~empty)
    kept = kept[np.argsort(box_image[kept], kind="stable")]
    if not len(kept):
        _refuse(annotation_file, ["no box with a width, a height and an image is left: there is nothing to learn"])
    box_counts = np.bincount(box_image[kept], minlength=len(present))[present]
    outlines = _outlines(annotation_file, columns, kept, columns.sizes_hw[box_image]) if segmentations else None
    return Split(
        annotation_file=annotation_file,
        image_folder=image_folder,
        image_ids=columns.image_ids[present],
        file_names=np.array([os.fsencode(columns.file_names[i]) for i in np.flatnonzero(present)]),
        sizes_hw=columns.sizes_hw[present].astype(np.int32),
        box_starts=_starts(box_counts),
        boxes_xyxy=boxes_f32[kept],
        labels=1 + label_less_one[kept],
        crowd=columns.crowd[kept] != 0,
        categories=tuple(Category(int(columns.category_ids[i]), columns.category_names[i]) for i in category_order),
        dropped_boxes=int((here & empty).sum()),
        clipped_boxes=int((here & ~empty & past_border).sum()),
        missing_images=missing_images,
        outlines=outlines,
    )


@dataclass(frozen=True, eq=False)
class _Columns:
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


def _read_columns(annotation_file: Path, segmentations: bool = False) -> _Columns:
    try:
        text = annotation_file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{annotation_file}: cannot be read: {error.strerror}. {AGAIN}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{annotation_file}: broken JSON: {error}. {AGAIN}.") from None
    return _typed_columns(text, segmentations) or _checked_columns(annotation_file, text, segmentations)


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


def _typed_columns(text: str, segmentations: bool) -> _Columns | None:
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

        return _Columns(
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


def _checked_columns(annotation_file: Path, text: str, segmentations: bool) -> _Columns:
    content = _parse(annotation_file, text, segmentations)
    problems: list[str] = []
    images = _Table("images", content, problems)
    categories = _Table("categories", content, problems)
    annotations = _Table("annotations", content, problems)
    annotations.values("area", NUMBER)  # unused here, but its lack would end the first evaluation, hours later
    heights, widths = images.integers("height"), images.integers("width")
    columns = _Columns(
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
    _refuse(annotation_file, problems)
    return columns


def _mistakes(columns: _Columns) -> list[str]:
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
    box_image, image_known = _find(columns.box_image_ids, columns.image_ids)
    _, category_known = _find(columns.box_category_ids, columns.category_ids)
    report(~image_known, "boxes with an unknown image_id", box)
    report(~category_known, "boxes with an unknown category_id", box)

    extents_wh = columns.boxes_xywh[:, 2:]
    finite = np.all(np.isfinite(columns.boxes_xywh), axis=1)
    negative = finite & np.any(extents_wh < 0, axis=1)
    boxes_xyxy = _to_xyxy(np.where(finite[:, None], columns.boxes_xywh, 0))
    beyond = (boxes_xyxy[:, 2:] <= 0) | (boxes_xyxy[:, :2] >= sizes_hw[box_image, ::-1])
    report(~finite, "boxes with NaN or infinity", box)
    report(negative, "boxes with a negative width or height", box)
    report(
        np.any(beyond, axis=1) & np.all(extents_wh > 0, axis=1) & finite & image_known,
        "boxes wholly outside their image",
        box,
    )
    return problems


def _refuse(annotation_file: Path, problems: list[str]) -> None:
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


class _RunLengths(msgspec.Struct, gc=False):
    """A mask down the columns of its image, as lengths of 0s and 1s in turn, or these in COCO's compressed text."""

    size: tuple[int, int]
    counts: list[int] | str


_Segmentation = list[list[float]] | _RunLengths | None
_SEGMENTATION = msgspec.json.Decoder(_Segmentation)


class _NoMask(ValueError):
    """What is wrong with a segmentation."""


def _outlines(
    annotation_file: Path, columns: _Columns, rows: NDArray[np.int64], sizes_hw: NDArray[np.int64]
) -> Outlines:
    """The masks of these rows of the annotations, in their order; sizes_hw: (rows of the file, 2) of their images."""
    points, line_lengths = array("f"), array("q")
    line_counts = np.zeros(len(rows), dtype=np.int64)
    wrong: list[str] = []
    for place, row in enumerate(rows.tolist()):
        before = len(line_lengths)
        try:
            mask = _decode_segmentation(columns.segmentations[row])
            if isinstance(mask, _RunLengths):
                runs = _runs(mask, sizes_hw[row])
                if not columns.crowd[row]:
                    borders = _borders(runs, int(sizes_hw[row, 0]))
                    points.frombytes(borders.tobytes())
                    line_lengths.extend([2] * len(borders))
            else:
                for polygon in mask:
                    _check_polygon(polygon)
                for polygon in () if columns.crowd[row] else mask:
                    points.extend(polygon)
                    points.extend(polygon[:2])
                    line_lengths.append(len(polygon) // 2 + 1)
        except _NoMask as error:
            wrong.append(f"annotation {columns.annotation_ids[row]}, image_id {columns.box_image_ids[row]}: {error}")
        line_counts[place] = len(line_lengths) - before
    if wrong:
        _refuse(
            annotation_file,
            [f"annotations whose segmentation is no mask: {len(wrong)} of {len(rows)} (first: {wrong[0]})"],
        )
    return Outlines(
        line_starts=_starts(line_counts),
        point_starts=_starts(np.array(line_lengths)),
        points_xy=np.array(points).reshape(-1, 2),
    )


def _decode_segmentation(value: Any) -> list[list[float]] | _RunLengths:
    try:
        mask = _SEGMENTATION.decode(value) if isinstance(value, msgspec.Raw) else msgspec.convert(value, _Segmentation)
    except (msgspec.DecodeError, OverflowError, RecursionError, UnicodeError):
        raise _NoMask("neither polygons nor run lengths") from None
    if not mask:
        raise _NoMask("it is missing" if mask is None else "no polygon is in it")
    return mask


def _check_polygon(polygon: list[float]) -> None:
    if len(polygon) % 2:
        raise _NoMask(f"a polygon of {len(polygon)} coordinates, which is odd")
    if len(polygon) < 6:
        raise _NoMask(f"a polygon of {len(polygon) // 2} points, where 3 are the least")
    if not all(map(math.isfinite, polygon)):
        raise _NoMask("a polygon with NaN or infinity")


def _runs(mask: _RunLengths, size_hw: NDArray[np.int64]) -> NDArray[np.int64]:
    """(runs, 2): where the runs of ones start and stop, in pixels counted down the columns of the image."""
    height, width = size_hw.tolist()
    if mask.size != (height, width):
        raise _NoMask(f"run lengths of {mask.size[1]}×{mask.size[0]} pixels, and the image has {width}×{height}")
    counts = _decompress(mask.counts) if isinstance(mask.counts, str) else mask.counts
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise _NoMask(f"run lengths that do not add up to {width}×{height} pixels")
    ends = np.cumsum(counts)
    return ends[: len(ends) // 2 * 2].reshape(-1, 2)


def _decompress(text: str) -> list[int]:
    """The run lengths of COCO's compressed text: six bits a character, the differences to the last but one.

    pycocotools decodes them, too, but not to numbers, and leaves what a text that is too short does not say undefined.
    """
    counts: list[int] = []
    value = shift = 0
    for code in text.encode():
        bits = code - 48
        if not 0 <= bits < 64 or shift > 60:
            raise _NoMask("run lengths in a text that is not COCO's")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise _NoMask("run lengths in a text that breaks off")
    return counts


def _borders(runs: NDArray[np.int64], height: int) -> NDArray[np.float32]:
    """The runs of `_runs` as lines (L, 2, 2) x, y: of each upright rectangle the left border down, the right one up.

    A run that goes on in further columns is cut into its part of the first column, whole columns, and the rest.
    """
    runs = runs[runs[:, 0] < runs[:, 1]]
    (left, top), (right, bottom) = np.divmod(runs[:, 0], height), np.divmod(runs[:, 1] - 1, height)
    within = left == right
    none, whole = np.zeros_like(left), np.full_like(left, height)
    rectangles_xyxy = np.concatenate(
        [
            np.stack([left, top, left + 1, np.where(within, bottom + 1, height)], axis=1),
            np.stack([left + 1, none, right, whole], axis=1)[right > left + 1],
            np.stack([right, none, right + 1, bottom + 1], axis=1)[~within],
        ]
    ).astype(np.float32)
    return rectangles_xyxy[:, [[[0, 1], [0, 3]], [[2, 3], [2, 1]]]].reshape(-1, 2, 2)


def _filled(lines: Sequence[NDArray[np.float64]], size_hw: tuple[int, int]) -> CompressedMask:
    """What is inside of a box's lines, those of `Outlines`."""
    if len(lines[0]) == 2:  # left and right borders in turn, as `_borders` makes them
        corners = np.concatenate(lines).reshape(-1, 4, 2)
        shapes: Any = np.concatenate([corners[:, 0], corners[:, 2] - corners[:, 0]], axis=1)
    else:
        shapes = [line[:-1].ravel().tolist() for line in lines]
    merged = mask_api.merge(mask_api.frPyObjects(shapes, *size_hw))
    return {"size": list(size_hw), "counts": merged["counts"].decode()}


def compress(run_lengths: NDArray[np.int64], size_hw: tuple[int, int]) -> CompressedMask:
    """A mask's run lengths, down the columns, 0s and 1s in turn, beginning with the 0s, in COCO's compressed text."""
    plain = {"size": list(size_hw), "counts": run_lengths.tolist()}
    return {"size": list(size_hw), "counts": mask_api.frPyObjects(plain, *size_hw)["counts"].decode()}


def bitmap(mask: CompressedMask) -> NDArray[np.uint8]:
    """A mask as (H, W) of 0 and 1."""
    pixels: NDArray[np.uint8] = mask_api.decode(mask)
    return pixels


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


def _present(file_names: list[str], image_folder: Path) -> NDArray[np.bool_]:
    """Which of the names are files: by one listing, since 118,287 calls take minutes on a network disk."""
    try:
        with os.scandir(image_folder) as entries:
            listed = {entry.name for entry in entries}
    except OSError as error:
        raise InputError(f"{image_folder}: no folder of images: {error.strerror}. Run ./init_datasets.sh.") from None
    there = (name in listed or os.path.isfile(image_folder / name) for name in file_names)  # or in a subfolder
    return np.fromiter(there, dtype=bool, count=len(file_names))


def _find(wanted: NDArray[np.int64], ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Index in `ids` of each wanted id, any index where there is none, and whether there is one."""
    order = np.argsort(ids)
    index = order[np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)]
    return index, ids[index] == wanted


def _repeated(ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which ids an earlier row has already."""
    repeated = np.ones(len(ids), dtype=bool)
    repeated[np.unique(ids, return_index=True)[1]] = False
    return repeated


def _to_xyxy(boxes_xywh: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
