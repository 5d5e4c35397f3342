"""One split of a COCO-format data set as flat arrays, validated before training.

Shapes: N images, M boxes, K classes including background (label 0), K - 1 categories.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from detection.config.run_config import OPEN_IMAGES, ExifRule, RunConfig
from detection.config.settings import InputError
from detection.data import coco_arrays, coco_json, open_images, polygons, rle
from detection.data.box_checks import suspect_boxes
from detection.data.image_file import ImageFile
from detection.data.image_headers import map_files, read_header
from detection.data.missing_files import describe_missing
from detection.data.polygons import PolygonArrays, offsets
from detection.data.rle import CocoRle

BOXES_PER_BLOCK = 2**15  # whose intermediate results stay in the cache
# COCO rounds x and width to 2 decimals each, so their sum is off by up to 0.01 pixels at the border.
BORDER_ROUNDING_PX = 0.02


@dataclass(frozen=True)
class Category:
    """Name and id of one category, both from the annotation file."""

    id: int
    name: str


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a COCO-format data set as flat arrays, which forked data workers share without a copy."""

    annotation_file: Path
    image_dir: Path
    image_ids: NDArray[np.int64]
    """(N,) in the order of the annotation file."""
    file_names: NDArray[np.bytes_]
    """(N,) relative to image_dir. Bytes, because every worker would copy a list of str."""
    sizes_hw: NDArray[np.int32]
    """(N, 2) pixels, from the annotation file."""
    box_offsets: NDArray[np.int64]
    """(N + 1,): the boxes of image i are rows box_offsets[i] to box_offsets[i + 1]."""
    boxes_xyxy: NDArray[np.float32]
    """(M, 4) pixels, clipped to the image, never empty."""
    labels: NDArray[np.int64]
    """(M,) 1 to K - 1: categories[label - 1]."""
    is_crowd: NDArray[np.bool_]
    """(M,) True where the box covers a group of objects."""
    categories: tuple[Category, ...]
    """(K - 1,) in ascending order of their ids (COCO uses 80 of the ids 1 to 90), or in that of the training images."""
    num_dropped_boxes: int
    """Boxes of zero width or height in the image, where log(width) is undefined. COCO itself has a few."""
    num_clipped_boxes: int
    """Boxes that extended past the border by more than rounding error."""
    num_missing_images: int
    """Images without a file, skipped together with their boxes."""
    polygons: PolygonArrays | None = None
    """Masks of the boxes, if requested."""
    exif: ExifRule = "auto"
    """Rule for the EXIF orientation of the images."""
    remarks: tuple[str, ...] = ()
    """Fields that were filled, and boxes that are probably wrong."""

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_classes(self) -> int:
        """K: the categories plus background."""
        return 1 + len(self.categories)

    def image_path(self, index: int) -> Path:
        """Return the path of image `index` (0 to N - 1)."""
        return self.image_dir / os.fsdecode(bytes(self.file_names[index]))

    def image_file(self, index: int) -> ImageFile:
        """Return the file of image `index`, from which its pixels are read."""
        height, width = self.sizes_hw[index].tolist()
        return ImageFile(self.image_path(index), (height, width), self.exif)

    def rng_key(self, index: int) -> int:
        """Return the id of image `index` as a part of a seed, which must not be negative."""
        return int(self.image_ids[index].view(np.uint64))

    def boxes(self, index: int) -> NDArray[np.float32]:
        """Return a view of the boxes of image `index`: (G, 4) xyxy in pixels."""
        return self.boxes_xyxy[self.box_offsets[index] : self.box_offsets[index + 1]]

    def image_labels(self, index: int) -> NDArray[np.int64]:
        """Return a view of the labels of image `index`: (G,)."""
        return self.labels[self.box_offsets[index] : self.box_offsets[index + 1]]

    def masks(self, index: int) -> list[CocoRle | None]:
        """Return one mask per box of image `index`, or None for a box without a mask.

        The split must have been read with `segmentations`.
        """
        arrays = self.polygons
        assert arrays is not None, "the split was read without masks"
        height, width = self.sizes_hw[index].tolist()
        masks: list[CocoRle | None] = []
        for box in range(*self.box_offsets[index : index + 2].tolist()):
            first, last = arrays.ring_offsets[box : box + 2].tolist()
            ends = arrays.point_offsets[first : last + 1].tolist()
            # Undo the float32 rounding: pycocotools rounds to fifths of a pixel, where ties are common.
            rings = [arrays.points_xy[start:end].astype(np.float64).round(3) for start, end in pairwise(ends)]
            masks.append(rle.fill_polygons(rings, (height, width)) if rings else None)
        return masks

    @property
    def is_labeled(self) -> bool:
        """True unless the file holds no annotations."""
        return len(self.labels) > 0

    @property
    def has_boxes(self) -> NDArray[np.bool_]:
        """(N,) True for images with a box. A crowd counts as a box."""
        return np.diff(self.box_offsets) > 0

    def drop_empty_images(self) -> "Split":
        """Return the split without images that have no box. A crowd counts as a box."""
        counts, keep = np.diff(self.box_offsets), self.has_boxes
        return replace(
            self,
            image_ids=self.image_ids[keep],
            file_names=self.file_names[keep],
            sizes_hw=self.sizes_hw[keep],
            box_offsets=offsets(counts[keep]),
        )

    def drop_crowds(self) -> "Split":
        """Return the split with the same images and without their crowd boxes."""
        return self.keep_boxes(~self.is_crowd)

    def keep_boxes(self, keep: NDArray[np.bool_]) -> "Split":
        """Return the split with the same images and only the boxes where keep (M,) is True."""
        kept_before = offsets(keep.astype(np.int64))
        return replace(
            self,
            box_offsets=kept_before[self.box_offsets],
            boxes_xyxy=self.boxes_xyxy[keep],
            labels=self.labels[keep],
            is_crowd=self.is_crowd[keep],
            polygons=self.polygons.keep_boxes(keep) if self.polygons else None,
        )


FETCH_HINTS = {
    "coco2017": "Run ./init_datasets.sh to fetch COCO 2017.",
    OPEN_IMAGES: "Run BENCHMARK=retinanet ./init_datasets.sh to fetch Open Images.",
}
"""Advice that gets a published data set, by its name."""


@contextmanager
def fetch_hint(config: RunConfig) -> Iterator[None]:
    """Add to an InputError how to get the data set, if it is a published one."""
    try:
        yield
    except InputError as error:
        if hint := FETCH_HINTS.get(config.dataset):
            raise InputError(f"{error} {hint}") from None
        raise


def dataset_paths(
    config: RunConfig, split: Literal["train", "val"], *, segmentations: bool = False
) -> tuple[Path, Path]:
    """Return the annotation file and image folder of a split, from the settings or else from DATADIR.

    segmentations: see `standard_paths`. Raises InputError if DATADIR or one of its expected entries is missing.
    """
    annotations, images = getattr(config, f"{split}_annotations"), getattr(config, f"{split}_images")
    if annotations:
        return Path(annotations), Path(images)
    with fetch_hint(config):
        if config.dataset == OPEN_IMAGES:
            return open_images.paths(config.data_dir, split)
        return standard_paths(config.data_dir, split, segmentations=segmentations)


def standard_paths(data_dir: Path, split: Literal["train", "val"], *, segmentations: bool = False) -> tuple[Path, Path]:
    """Return the annotation file and image folder of a split in COCO 2017's layout.

    Training uses the box-only annotations of prepare-json.py if available. With `segmentations` it uses the full
    file, because the box-only file has no masks.
    Raises InputError if the folder, the annotation file or the images are missing.
    """
    annotations, image_dir = data_dir / "annotations", data_dir / f"{split}2017"
    annotation_file = annotations / f"instances_{split}2017.json"
    box_only = annotations / f"bbox_only_instances_{split}2017.json"
    if split == "train" and not segmentations and box_only.is_file():
        annotation_file = box_only
    hint = f"Set DATADIR to a folder that contains annotations/instances_{split}2017.json and {split}2017/."
    try:
        empty = not any(data_dir.iterdir())
    except OSError as error:
        raise InputError(f"DATADIR={data_dir}: {error.strerror}. {hint}") from None
    if empty:
        raise InputError(f"DATADIR={data_dir}: the folder is empty. {hint}")
    for path in (annotation_file, image_dir):
        if not path.exists():
            raise InputError(f"DATADIR={data_dir}: {path.relative_to(data_dir)} is missing. {hint}")
    return annotation_file, image_dir


def read_split(config: RunConfig, name: Literal["train", "val"], *, segmentations: bool = False) -> Split:
    """Read a split by the settings of a run. Raises InputError with all errors of its files."""
    paths = dataset_paths(config, name, segmentations=segmentations)
    with fetch_hint(config):
        return read(
            *paths,
            skip_missing_images=config.skip_missing_images,
            segmentations=segmentations,
            torchvision_boxes=config.torchvision_boxes,
            exif=config.exif,
            allow_unlabeled=config.mode == "evaluate",
        )


def open_split(
    config: RunConfig, name: Literal["train", "val"], *, segmentations: bool = False, train: Split | None = None
) -> Split:
    """Read a split, and check that it has the number of classes of the settings. Raises InputError.

    train: the training images, whose labels the split takes.
    """
    split = read_split(config, name, segmentations=segmentations)
    if train:
        split = align_categories(split, train)
    check_num_classes(config.num_classes, split)
    return split


def align_categories(split: Split, train: Split) -> Split:
    """Return a split with the labels of the training images. Categories are matched by name, and keep their ids.

    Categories that only the training images have get unused ids. Raises InputError if the split has others.
    """
    if split.categories == train.categories:
        return split
    names, train_names = ([category.name for category in s.categories] for s in (split, train))
    unknown, absent = sorted(set(names) - set(train_names)), sorted(set(train_names) - set(names))
    problem = ""
    if unknown:
        problem = f"{', '.join(unknown)} {'is' if len(unknown) == 1 else 'are'} not in {train.annotation_file}"
        problem += f", which also has {', '.join(absent)}" if absent else ""
    elif len(set(names)) < len(names) or len(set(train_names)) < len(train_names):
        problem = f"their ids or order differ from {train.annotation_file}, and names occur twice"
    if problem:
        raise InputError(f"{split.annotation_file}: categories: {problem}. Use the same names in both files.")
    ids = {category.name: category.id for category in split.categories}
    unused = (number for number in count(1) if number not in ids.values())
    categories = tuple(Category(ids[name] if name in ids else next(unused), name) for name in train_names)
    new_labels = np.array([0, *(1 + train_names.index(name) for name in names)])
    remark = "categories: matched by name, since their ids or order differ from the training images"
    if absent:
        remark = f"categories: without {', '.join(absent)} of the training images, so the metric leaves them out"
    return replace(split, labels=new_labels[split.labels], categories=categories, remarks=(*split.remarks, remark))


def read_categories(annotation_file: Path) -> tuple[Category, ...]:
    """Read only the categories of an annotation file, in ascending order of their ids (labels 1, 2, ...).

    Raises InputError if the file is unreadable or not an annotation file.
    """
    return tuple(Category(*pair) for pair in sorted(coco_json.read_categories(annotation_file)))


def anonymous_categories(num_classes: int) -> tuple[Category, ...]:
    """Return categories named after their labels, for a model without category names."""
    return tuple(Category(label, str(label)) for label in range(1, num_classes))


def check_num_classes(num_classes: int, split: Split) -> None:
    """Raise InputError if `num_classes` is set (not 0) and differs from the annotations."""
    if num_classes in (0, split.num_classes):
        return
    raise InputError(
        f"{split.annotation_file}: {len(split.categories)} categories plus background make num_classes "
        f"{split.num_classes}, not {num_classes}. Pass --num-classes {split.num_classes}. For data other than COCO "
        "2017, pass --dataset with another name."
    )


def check_evaluable(split: Split) -> None:
    """Raise InputError if COCO's metric ignores all boxes of a split, because they are crowds."""
    if split.is_labeled and split.is_crowd.all():
        raise InputError(
            f"{split.annotation_file}: all {len(split.labels)} boxes have iscrowd 1, which COCO's metric ignores, so "
            "there is no AP. Set iscrowd to 0 for boxes of single objects."
        )


def read(
    annotation_file: Path,
    image_dir: Path,
    *,
    skip_missing_images: bool = False,
    segmentations: bool = False,
    torchvision_boxes: bool = False,
    exif: ExifRule = "auto",
    allow_unlabeled: bool = False,
) -> Split:
    """Read an annotation file and validate it against its image folder.

    Boxes of zero width or height are dropped and counted. Boxes past the border are clipped and counted. Boxes
    entirely outside are an error. With `torchvision_boxes` they are dropped and counted, and the right and lower
    borders are float32 sums, which may differ in the last bit: as in torchvision's training scripts, of which MLPerf's
    RetinaNet is one.
    An image without a file is an error, or is skipped and counted with `skip_missing_images`.
    `segmentations` also reads the masks: polygons, or RLE as integers or compressed text.
    `allow_unlabeled` accepts a file without annotations, as of test images.
    Without masks, the arrays of `coco_arrays` replace the annotation file if they are current.
    Raises InputError with all errors of the file. COCO's 860,001 training boxes take 6 s and 0.7 GiB at the peak
    from the box-only file of prepare-json.py, 9 s and 1.1 GiB with their polygons (measured on one core).
    """
    columns = coco_arrays.read(annotation_file, segmentations, allow_unlabeled=allow_unlabeled)
    has_file = _find_existing(columns.file_names, image_dir)
    num_images = len(has_file)
    num_missing = num_images - int(has_file.sum())
    columns = _fill_sizes(columns, has_file, image_dir, exif)
    remarks = [*columns.remarks]

    errors = coco_json.validate(columns, allow_outside=torchvision_boxes)
    box_image, has_image = coco_json.lookup(columns.box_image_ids, columns.image_ids)
    has_sizes = has_image.all() and (columns.sizes_hw > 0).all()
    if has_sizes and (suspicion := suspect_boxes(columns.boxes_xywh, columns.sizes_hw, box_image)):
        (errors if errors else remarks).append(suspicion)
    if num_missing and (num_missing == num_images or not skip_missing_images):
        errors.insert(0, describe_missing(columns.file_names, has_file, image_dir))
    coco_json.raise_if_any(annotation_file, errors)

    category_order = np.argsort(columns.category_ids)
    category_index, _ = coco_json.lookup(columns.box_category_ids, columns.category_ids[category_order])

    boxes_f32, is_clipped = _clip_boxes(columns, box_image, torchvision_boxes)
    is_empty = np.any(boxes_f32[:, 2:] <= boxes_f32[:, :2], axis=1)

    box_has_file = has_file[box_image]
    kept = np.flatnonzero(box_has_file & ~is_empty)
    kept = kept[np.argsort(box_image[kept], kind="stable")]
    if not len(kept) and len(box_image):
        coco_json.raise_if_any(
            annotation_file, ["no box with a width, a height and an image remains: there is nothing to train on"]
        )
    box_counts = np.bincount(box_image[kept], minlength=num_images)[has_file]
    return Split(
        annotation_file=annotation_file,
        image_dir=image_dir,
        image_ids=columns.image_ids[has_file].astype(np.int64),
        file_names=np.array([os.fsencode(columns.file_names[i]) for i in np.flatnonzero(has_file)]),
        sizes_hw=columns.sizes_hw[has_file].astype(np.int32),
        box_offsets=offsets(box_counts),
        boxes_xyxy=boxes_f32[kept],
        labels=1 + category_index[kept],
        is_crowd=columns.is_crowd[kept] != 0,
        categories=tuple(Category(int(columns.category_ids[i]), columns.category_names[i]) for i in category_order),
        num_dropped_boxes=int((box_has_file & is_empty).sum()),
        num_clipped_boxes=int((box_has_file & ~is_empty & is_clipped).sum()),
        num_missing_images=num_missing,
        polygons=polygons.read(annotation_file, columns, kept, columns.sizes_hw[box_image]) if segmentations else None,
        exif=exif,
        remarks=tuple(remarks),
    )


def _clip_boxes(
    columns: coco_json.Columns, box_image: NDArray[np.int64], torchvision_boxes: bool
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the boxes (rows of the file, 4) xyxy clipped to their images, and where that is not only rounding."""
    boxes = np.empty(columns.boxes_xywh.shape, dtype=np.float32)
    is_clipped = np.empty(len(boxes), dtype=bool)
    for start in range(0, len(boxes), BOXES_PER_BLOCK):
        rows = slice(start, start + BOXES_PER_BLOCK)
        boxes_xywh = columns.boxes_xywh[rows]
        boxes_xyxy = coco_json.to_xyxy(boxes_xywh.astype(np.float32) if torchvision_boxes else boxes_xywh)
        limits = np.tile(columns.sizes_hw[box_image[rows], ::-1], (1, 2)).astype(np.float64)
        clipped_xyxy = np.clip(boxes_xyxy, 0, limits)
        is_clipped[rows] = np.any(np.abs(clipped_xyxy - boxes_xyxy) > BORDER_ROUNDING_PX, axis=1)
        boxes[rows] = clipped_xyxy
    return boxes, is_clipped


def _fill_sizes(
    columns: coco_json.Columns, has_file: NDArray[np.bool_], image_dir: Path, exif: ExifRule
) -> coco_json.Columns:
    """Read missing sizes from the headers of the images. Raises InputError for an unreadable one."""
    is_missing = np.any(columns.sizes_hw == coco_json.MISSING, axis=1)
    if not is_missing.any():
        return columns
    sizes_hw = columns.sizes_hw.copy()
    sizes_hw[is_missing] = coco_json.JPEG_MAX_SIDE_PX  # of images without a file, which are skipped
    rows = np.flatnonzero(is_missing & has_file)
    headers = map_files(read_header, [ImageFile(image_dir / columns.file_names[row], None, exif) for row in rows])
    for row, header in zip(rows, headers, strict=True):
        if isinstance(header, InputError):
            raise header
        sizes_hw[row] = header.size_hw
    remark = f"{is_missing.sum()} of {len(is_missing)} images have no 'width' or 'height': read from their headers"
    return replace(columns, sizes_hw=sizes_hw, remarks=[*columns.remarks, remark])


def _find_existing(file_names: list[str], image_dir: Path) -> NDArray[np.bool_]:
    """Return (N,) True where a name is a file, from one listing: 118,287 calls take minutes on a network disk."""
    try:
        with os.scandir(image_dir) as entries:
            listed = {entry.name for entry in entries}
    except OSError as error:
        raise InputError(f"{image_dir}: image folder unreadable: {error.strerror}.") from None
    exists = (name in listed or os.path.isfile(image_dir / name) for name in file_names)  # may name a subfolder
    return np.fromiter(exists, dtype=bool, count=len(file_names))
