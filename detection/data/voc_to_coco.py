"""A Pascal VOC folder to COCO's format: python -m detection.data.voc_to_coco VOC OUT

Reads VOC/ImageSets/Main/{train,val,trainval,test}.txt, as many as there are, VOC/Annotations/*.xml and the headers of
VOC/JPEGImages, and writes OUT/instances_<set>.json for each; without ImageSets, OUT/instances_all.json of all. The
pictures stay where they are. Every file has the same categories, numbered from 1 in the order of their names.

VOC's boxes count pixels from 1 and include the last one; COCO's begin at 0 and have a width. Boxes that reach past the
border are cut there. What is `difficult` becomes `iscrowd`, the one thing that COCO's metric looks for and does not
count; unlike VOC's, it then forgives a detection that lies anywhere inside.
Format: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html, section 3.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from PIL import Image

from detection import atomic_file
from detection.config.settings import InputError

SETS = ("train", "val", "trainval", "test")
SHOWN_MISTAKES = 10


@dataclass(frozen=True)
class Thing:
    """An object of a picture: box_xywh in pixels from 0."""

    name: str
    box_xywh: tuple[float, float, float, float]
    difficult: bool


@dataclass(frozen=True)
class Annotated:
    """A picture with its objects. file_name: in JPEGImages; size_wh: pixels."""

    file_name: str
    size_wh: tuple[int, int]
    things: list[Thing]


def main(argv: Sequence[str]) -> int:
    """Convert a folder; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m detection.data.voc_to_coco",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("voc", type=Path, help="folder of JPEGImages, Annotations and ImageSets")
    parser.add_argument("out", type=Path, help="folder that the annotation files go to")
    arguments = parser.parse_args(argv)
    try:
        written = convert(arguments.voc, arguments.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    for path, content in written.items():
        print(f"{path}: {len(content['images'])} images, {len(content['annotations'])} boxes")
    print("categories:", ", ".join(category["name"] for category in content["categories"]))
    print("train with", " ".join(flags(arguments.voc / "JPEGImages", list(written))))
    return 0


def flags(images: Path, written: Sequence[Path]) -> list[str]:
    """The settings of a run on these annotation files: which it trains on, and which it is evaluated on."""
    by_set = {path.stem.removeprefix("instances_"): path for path in written}
    train = next((name for name in ("train", "trainval", "all") if name in by_set), next(iter(by_set)))
    val = next((name for name in ("val", "test") if name in by_set), train)
    words = []
    for split, name in (("train", train), ("val", val)):
        words += [
            f"--{split}-images",
            shlex.quote(str(images)),
            f"--{split}-annotations",
            shlex.quote(str(by_set[name])),
        ]
    return words


def convert(voc: Path, out: Path) -> dict[Path, dict[str, Any]]:
    """Write the annotation files of all sets; returns them by path. Raises InputError with what is wrong, by file."""
    for name in ("JPEGImages", "Annotations"):
        if not (voc / name).is_dir():
            raise InputError(f"{voc}: there is no folder {name}/: this is no Pascal VOC data set")
    sets = read_sets(voc)
    pictures = {path.name: path for path in (voc / "JPEGImages").iterdir()}
    by_stem = {path.stem: path for path in pictures.values()}
    annotated: dict[str, Annotated] = {}
    mistakes = []
    for key in sorted({key for keys in sets.values() for key in keys}):
        try:
            annotated[key] = read(voc / "Annotations" / f"{key}.xml", key, pictures, by_stem)
        except InputError as error:
            mistakes.append(str(error))
    if len(mistakes) > SHOWN_MISTAKES:
        mistakes[SHOWN_MISTAKES:] = [f"{len(mistakes) - SHOWN_MISTAKES} more files are wrong"]
    if mistakes:
        raise InputError("\n  ".join(mistakes))
    names = sorted({thing.name for picture in annotated.values() for thing in picture.things})
    ids = {key: number for number, key in enumerate(annotated, start=1)}
    out.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, keys in sets.items():
        path = out / f"instances_{name}.json"
        written[path] = to_coco({ids[key]: annotated[key] for key in keys}, names)
        with atomic_file.writing(path) as partial:
            partial.write_text(json.dumps(written[path]), encoding="utf-8")
    return written


def read_sets(voc: Path) -> dict[str, list[str]]:
    """The names of the pictures of each set, each once; InputError where there are none."""
    sets = {}
    for name in SETS:
        path = voc / "ImageSets" / "Main" / f"{name}.txt"
        if path.is_file():
            try:
                lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: byte {error.start} is no UTF-8 text") from None
            # Some lists say whether a class is there, after the name; a name may hold spaces.
            keys = [words[:-1] if words[1:] and words[-1] in ("-1", "0", "1") else words for words in lines if words]
            sets[name] = list(dict.fromkeys(" ".join(words) for words in keys))
    if not sets:
        sets["all"] = sorted(path.stem for path in (voc / "Annotations").glob("*.xml"))
    if empty := [name for name, keys in sets.items() if not keys]:
        raise InputError(f"{voc}: no picture is in the set {empty[0]}")
    return sets


def read(path: Path, key: str, pictures: dict[str, Path], by_stem: dict[str, Path]) -> Annotated:
    """Read the annotation of a picture; raises InputError that names the file.

    pictures: by file name; by_stem: the same by name without suffix, since many a <filename> is another machine's.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # also an encoding that does not exist
        raise InputError(f"{path}: broken XML: {error}") from None
    picture = pictures.get((root.findtext("filename") or "").strip()) or by_stem.get(key)
    if picture is None:
        raise InputError(f"{path}: its picture, {key}.*, is not in JPEGImages/")
    try:
        with Image.open(picture) as image:
            size_wh = image.size
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{picture}: this picture cannot be read ({error})") from None
    said = tuple(number(path, root, f"size/{side}", default=0.0) for side in ("width", "height"))
    if all(said) and said != size_wh:
        raise InputError(
            f"{path}: the size is {said[0]:g}×{said[1]:g}, and {picture.name} has {size_wh[0]}×{size_wh[1]} pixels: "
            "are the boxes those of another picture?"
        )
    return Annotated(picture.name, size_wh, [read_thing(path, element, size_wh) for element in root.iter("object")])


def read_thing(path: Path, element: Element, size_wh: tuple[int, int]) -> Thing:
    """Read an object of a picture of this size; raises InputError that names the file."""
    name = (element.findtext("name") or "").strip()
    if not name:
        raise InputError(f"{path}: an object has no name")
    left, top, right, bottom = (number(path, element, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
    x, y = max(left - 1, 0.0), max(top - 1, 0.0)
    width, height = min(right, size_wh[0]) - x, min(bottom, size_wh[1]) - y
    if width <= 0 or height <= 0:
        raise InputError(
            f"{path}: {name} from {left:g}, {top:g} to {right:g}, {bottom:g} has no pixel in a picture of "
            f"{size_wh[0]}×{size_wh[1]}"
        )
    return Thing(name, (x, y, width, height), number(path, element, "difficult", default=0.0) == 1)


def number(path: Path, element: Element, where: str, default: float | None = None) -> float:
    """The number in a child of an XML element; raises InputError where it is none, or absent and without default."""
    text = (element.findtext(where) or "").strip()
    if not text and default is not None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{path}: {where} is '{text}', not a number")
    return value


def to_coco(pictures: dict[int, Annotated], names: Sequence[str]) -> dict[str, Any]:
    """The content of an annotation file: pictures by id, and the names of all categories."""
    labels = {name: label for label, name in enumerate(names, start=1)}
    things = [(image_id, thing) for image_id, picture in pictures.items() for thing in picture.things]
    return {
        "images": [
            {"id": image_id, "file_name": picture.file_name, "width": picture.size_wh[0], "height": picture.size_wh[1]}
            for image_id, picture in pictures.items()
        ],
        "annotations": [
            {
                "id": annotation_id,
                "image_id": image_id,
                "category_id": labels[thing.name],
                "bbox": thing.box_xywh,
                "area": thing.box_xywh[2] * thing.box_xywh[3],
                "iscrowd": int(thing.difficult),
            }
            for annotation_id, (image_id, thing) in enumerate(things, start=1)
        ],
        "categories": [{"id": label, "name": name} for name, label in labels.items()],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
