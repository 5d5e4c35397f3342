"""Converter from Pascal VOC to COCO format.

    python -m detection.data.voc_to_coco VOC OUT

Reads the available VOC/ImageSets/Main/{train,val,trainval,test}.txt, VOC/Annotations/*.xml and the headers of
VOC/JPEGImages. Writes OUT/instances_<set>.json per set, or OUT/instances_all.json if there are no ImageSets.
Images are not copied. All files have the same categories, numbered from 1 in alphabetical order.

VOC's boxes count pixels from 1 and include the last one. COCO's start at 0 and have a width. Boxes past the border are
clipped. `difficult` becomes `iscrowd`, the only objects that COCO's metric matches without counting them. Unlike VOC's
metric, COCO's then ignores a detection anywhere inside the box.
Format: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html, section 3.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from detection import atomic_file
from detection.config.settings import InputError, report_errors
from detection.data.image_file import ImageFile
from detection.data.image_headers import read_header
from mlperf import stdio

SETS = ("train", "val", "trainval", "test")
MAX_SHOWN_ERRORS = 10


class VocImage(NamedTuple):
    """Image: its row of a COCO annotation file, and name and row of each of its objects. The rows have no ids yet."""

    row: dict[str, Any]
    objects: list[tuple[str, dict[str, Any]]]


@report_errors
def main(argv: Sequence[str]) -> int:
    """Convert a folder and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m detection.data.voc_to_coco",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("voc", type=Path, help="folder of JPEGImages, Annotations and ImageSets")
    parser.add_argument("out", type=Path, help="output folder for the annotation files")
    arguments = parser.parse_args(argv)
    written = convert(arguments.voc, arguments.out)
    for path, content in written.items():
        print(f"{path}: {len(content['images'])} images, {len(content['annotations'])} boxes")
    print("categories:", ", ".join(category["name"] for category in content["categories"]))
    print("train with", " ".join(training_flags(arguments.voc / "JPEGImages", list(written))))
    return 0


def training_flags(image_dir: Path, annotation_files: Sequence[Path]) -> list[str]:
    """Return the flags of a run that trains and evaluates on these annotation files."""
    by_set = {path.stem.removeprefix("instances_"): path for path in annotation_files}
    train = next((name for name in ("train", "trainval", "all") if name in by_set), next(iter(by_set)))
    val = next((name for name in ("val", "test") if name in by_set), train)
    paths = {"train": by_set[train], "val": by_set[val]}
    return [
        f"--{split}-{kind} {shlex.quote(str(path))}"
        for split, annotations in paths.items()
        for kind, path in (("images", image_dir), ("annotations", annotations))
    ]


def convert(voc: Path, out: Path) -> dict[Path, dict[str, Any]]:
    """Write the annotation files of all sets and return their contents by path.

    Raises InputError with the errors of all files.
    """
    for name in ("JPEGImages", "Annotations"):
        if not (voc / name).is_dir():
            raise InputError(f"{voc}: no folder {name}/. Pass the folder of a Pascal VOC data set.")
    sets = read_sets(voc)
    image_paths = {path.name: path for path in (voc / "JPEGImages").iterdir()}
    by_stem = {path.stem: path for path in image_paths.values()}
    images: dict[str, VocImage] = {}
    errors = []
    for key in sorted({key for keys in sets.values() for key in keys}):
        try:
            images[key] = read_annotation(voc / "Annotations" / f"{key}.xml", key, image_paths, by_stem)
        except InputError as error:
            errors.append(str(error))
    if len(errors) > MAX_SHOWN_ERRORS:
        errors[MAX_SHOWN_ERRORS:] = [f"{len(errors) - MAX_SHOWN_ERRORS} more files have errors"]
    if errors:
        raise InputError("\n".join(errors))
    names = sorted({name for image in images.values() for name, _ in image.objects})
    ids = {key: image_id for image_id, key in enumerate(images, start=1)}
    out.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, keys in sets.items():
        path = out / f"instances_{name}.json"
        written[path] = to_coco({ids[key]: images[key] for key in keys}, names)
        with atomic_file.atomic_write(path) as partial:
            partial.write_text(json.dumps(written[path]), encoding="utf-8")
    return written


def read_sets(voc: Path) -> dict[str, list[str]]:
    """Return the image names of each set without duplicates. Raises InputError for an empty set."""
    sets = {}
    for name in SETS:
        path = voc / "ImageSets" / "Main" / f"{name}.txt"
        if path.is_file():
            try:
                lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: byte {error.start} is not UTF-8") from None
            # Some lists have a class flag after the name. A name may contain spaces.
            keys = [words[:-1] if words[1:] and words[-1] in ("-1", "0", "1") else words for words in lines if words]
            sets[name] = list(dict.fromkeys(" ".join(words) for words in keys))
    if not sets:
        sets["all"] = sorted(path.stem for path in (voc / "Annotations").glob("*.xml"))
    if empty := [name for name, keys in sets.items() if not keys]:
        raise InputError(f"{voc}: set {empty[0]} has no images")
    return sets


def read_annotation(path: Path, key: str, image_paths: dict[str, Path], by_stem: dict[str, Path]) -> VocImage:
    """Read the annotation of one image. Raises InputError with the path of an invalid file.

    image_paths: by file name. by_stem: by file name without suffix, because many <filename> entries are outdated.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # includes an unknown encoding
        raise InputError(f"{path}: invalid XML: {error}") from None
    image_path = image_paths.get((root.findtext("filename") or "").strip()) or by_stem.get(key)
    if image_path is None:
        raise InputError(f"{path}: its image {key}.* is not in JPEGImages/")
    annotated_wh = [parse_number(path, root, f"size/{side}", default=0.0) for side in ("width", "height")]
    if any(side % 1 for side in annotated_wh):
        raise InputError(f"{path}: the size is {annotated_wh[0]:g}×{annotated_wh[1]:g}. Give it in whole pixels.")
    width, height = map(int, annotated_wh)
    header = read_header(ImageFile(image_path, (height, width) if width and height else None))
    if isinstance(header, InputError):
        raise InputError(f"{path}: {header}")
    height, width = header.size_hw
    row = {"file_name": image_path.name, "width": width, "height": height}
    return VocImage(row, [parse_object(path, element, (width, height)) for element in root.iter("object")])


def parse_object(path: Path, element: Element, size_wh: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    """Return name and row of an object in an image of this size. Raises InputError with the path of an invalid file."""
    name = (element.findtext("name") or "").strip()
    if not name:
        raise InputError(f"{path}: an object has no name")
    left, top, right, bottom = (
        parse_number(path, element, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")
    )
    x, y = max(left - 1, 0.0), max(top - 1, 0.0)
    width, height = min(right, size_wh[0]) - x, min(bottom, size_wh[1]) - y
    if width <= 0 or height <= 0:
        raise InputError(
            f"{path}: {name} from {left:g}, {top:g} to {right:g}, {bottom:g} has no pixel in an image of "
            f"{size_wh[0]}×{size_wh[1]}"
        )
    is_difficult = parse_number(path, element, "difficult", default=0.0) == 1
    return name, {"bbox": (x, y, width, height), "area": width * height, "iscrowd": int(is_difficult)}


def parse_number(path: Path, element: Element, child_path: str, default: float | None = None) -> float:
    """Return the number in a child of an XML element, or `default` if the child is missing.

    Raises InputError if it is not a number, or missing without a default.
    """
    text = (element.findtext(child_path) or "").strip()
    if not text and default is not None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{path}: {child_path} is '{text}', not a number")
    return value


def to_coco(images: dict[int, VocImage], names: Sequence[str]) -> dict[str, Any]:
    """Return the content of an annotation file. images: by id. names: of all categories."""
    labels = {name: label for label, name in enumerate(names, start=1)}
    objects = [(image_id, *obj) for image_id, image in images.items() for obj in image.objects]
    return {
        "images": [{"id": image_id, **image.row} for image_id, image in images.items()],
        "annotations": [
            {"id": annotation_id, "image_id": image_id, "category_id": labels[name], **row}
            for annotation_id, (image_id, name, row) in enumerate(objects, start=1)
        ],
        "categories": [{"id": label, "name": name} for name, label in labels.items()],
    }


if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(main(sys.argv[1:]))
