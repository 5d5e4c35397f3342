"""One split of a COCO-format data set as flat arrays, checked before anything is trained on it.

Shapes: N images, M boxes, K classes with background (label 0), so K - 1 categories.
"""

import os
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from detection.config.run_config import RunConfig
from detection.config.settings import InputError
from detection.data import coco_json, polygons, rle
from detection.data.polygons import Outlines, starts
from detection.data.rle import CompressedMask

# COCO rounds x and width to 2 decimals each, so their sum is off by up to .01 pixels at the border.
BORDER_ROUNDING_PX = 0.02


@dataclass(frozen=True)
class Category:
    """What one label stands for: `id` as in the annotation file, with its name."""

    id: int
    name: str


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
            masks.append(rle.filled(lines, (height, width)) if lines else None)
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
            box_starts=starts(counts[keep]),
        )

    def without_crowds(self) -> "Split":
        """The same images without the boxes that stand for groups of objects."""
        keep = ~self.crowd
        kept_before = starts(keep.astype(np.int64))
        outlines = self.outlines
        if outlines:  # of which a crowd has none, so that all lines stay
            outlines = replace(outlines, line_starts=starts(np.diff(outlines.line_starts)[keep]))
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
    return tuple(Category(*pair) for pair in sorted(coco_json.read_categories(annotation_file)))


def numbered(num_classes: int) -> tuple[Category, ...]:
    """Categories for as many labels that nobody has named: called by number."""
    return tuple(Category(label, str(label)) for label in range(1, num_classes))


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
    annotation_file: Path, image_folder: Path, *, skip_missing_images: bool = False, segmentations: bool = False
) -> Split:
    """Read and check an annotation file against its folder of images.

    Boxes of zero width or height are dropped, boxes that reach past the border clipped; both are counted.
    Images without a file are an error, or are left out and counted with `skip_missing_images`. Masks are read and checked
    with `segmentations`: polygons, and run lengths plain or compressed.
    Raises InputError with all that is wrong. COCO's 860,001 training boxes take 6 s and 0.7 GiB at the peak
    when shrunken by prepare-json.py, 9 s and 1.1 GiB with their polygons (measured on one core).
    """
    columns = coco_json.read(annotation_file, segmentations)
    present = _present(columns.file_names, image_folder)
    missing_images = len(present) - int(present.sum())

    problems = coco_json.mistakes(columns)
    if missing_images and not skip_missing_images:
        problems.insert(
            0,
            f"names {len(present)} images, {missing_images} of them are not in {image_folder.name}/ "
            f"(first: {columns.file_names[int(present.argmin())]}). Run ./init_datasets.sh, or pass "
            "--skip-missing-images to go on without them",
        )
    elif missing_images == len(present):
        problems.insert(0, f"none of its {len(present)} images is in {image_folder}. Run ./init_datasets.sh")
    coco_json.refuse(annotation_file, problems)

    box_image, _ = coco_json.find(columns.box_image_ids, columns.image_ids)
    category_order = np.argsort(columns.category_ids)
    label_less_one, _ = coco_json.find(columns.box_category_ids, columns.category_ids[category_order])

    boxes_xyxy = coco_json.to_xyxy(columns.boxes_xywh)
    inside_xyxy = np.clip(boxes_xyxy, 0, np.tile(columns.sizes_hw[box_image, ::-1], (1, 2)))
    past_border = np.any(np.abs(inside_xyxy - boxes_xyxy) > BORDER_ROUNDING_PX, axis=1)
    boxes_f32 = inside_xyxy.astype(np.float32)  # before the test for emptiness, which the rounding may cause
    empty = np.any(boxes_f32[:, 2:] <= boxes_f32[:, :2], axis=1)

    here = present[box_image]
    kept = np.flatnonzero(here & ~empty)
    kept = kept[np.argsort(box_image[kept], kind="stable")]
    if not len(kept):
        coco_json.refuse(
            annotation_file, ["no box with a width, a height and an image is left: there is nothing to learn"]
        )
    box_counts = np.bincount(box_image[kept], minlength=len(present))[present]
    return Split(
        annotation_file=annotation_file,
        image_folder=image_folder,
        image_ids=columns.image_ids[present],
        file_names=np.array([os.fsencode(columns.file_names[i]) for i in np.flatnonzero(present)]),
        sizes_hw=columns.sizes_hw[present].astype(np.int32),
        box_starts=starts(box_counts),
        boxes_xyxy=boxes_f32[kept],
        labels=1 + label_less_one[kept],
        crowd=columns.crowd[kept] != 0,
        categories=tuple(Category(int(columns.category_ids[i]), columns.category_names[i]) for i in category_order),
        dropped_boxes=int((here & empty).sum()),
        clipped_boxes=int((here & ~empty & past_border).sum()),
        missing_images=missing_images,
        outlines=polygons.read(annotation_file, columns, kept, columns.sizes_hw[box_image]) if segmentations else None,
    )


def _present(file_names: list[str], image_folder: Path) -> NDArray[np.bool_]:
    """Which of the names are files: by one listing, since 118,287 calls take minutes on a network disk."""
    try:
        with os.scandir(image_folder) as entries:
            listed = {entry.name for entry in entries}
    except OSError as error:
        raise InputError(f"{image_folder}: no folder of images: {error.strerror}. Run ./init_datasets.sh.") from None
    there = (name in listed or os.path.isfile(image_folder / name) for name in file_names)  # or in a subfolder
    return np.fromiter(there, dtype=bool, count=len(file_names))
