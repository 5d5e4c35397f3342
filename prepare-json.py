#!/usr/bin/env python3
"""Reduce a COCO annotation file to boxes, mask areas and crowd flags. Standard library only."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

KEPT_KEYS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
    "categories": ("id", "name", "supercategory"),
}
REQUIRED_KEYS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id", "bbox", "area"),
    "categories": ("id", "name"),
}


def load(path: Path) -> dict[str, Any]:
    """Read a COCO annotation file. Raises ValueError with the position of an error in it."""
    try:
        data: dict[str, Any] = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8: {error.reason}") from None
    for section, required in REQUIRED_KEYS.items():
        entries = data.get(section) if isinstance(data, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{path}: no list '{section}': not a COCO annotation file")
        for index, entry in enumerate(entries):
            missing = [key for key in required if not isinstance(entry, dict) or key not in entry]
            if missing:
                raise ValueError(f"{path}: {section}[{index}] has no '{missing[0]}'")
    return data


def shrink(data: dict[str, Any], keep_keys: bool = False) -> dict[str, Any]:
    """Drop the masks, and every unused key unless `keep_keys`.

    Areas remain those of the masks, not of the boxes: COCO's small, medium and large depend on them.
    """

    def filter_keys(section: str) -> list[dict[str, Any]]:
        if keep_keys:
            return [{key: entry[key] for key in entry if key != "segmentation"} for entry in data[section]]
        return [{key: entry[key] for key in KEPT_KEYS[section] if key in entry} for entry in data[section]]

    return {**data, **{section: filter_keys(section) for section in KEPT_KEYS}}


def write(data: dict[str, Any], path: Path, pretty: bool = False) -> None:
    """Write JSON to a temporary file and rename it. Raises ValueError if that fails."""
    part = path.with_name(path.name + ".part")
    layout: dict[str, Any] = {"indent": 2} if pretty else {"separators": (",", ":")}
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(json.dumps(data, **layout) + "\n")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from None


def main() -> None:
    """Run the command line. Exit with status 2 if the input is invalid."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", type=Path, help="annotation file, e.g. instances_train2017.json")
    parser.add_argument("output", type=Path, help="file to write, e.g. bbox_only_instances_train2017.json")
    parser.add_argument("-k", "--keep-keys", action="store_true", help="keep every key except the segmentations")
    parser.add_argument("-p", "--pretty-print", action="store_true", help="indent the output")
    arguments = parser.parse_args()
    try:
        data = load(arguments.input)
        write(shrink(data, arguments.keep_keys), arguments.output, arguments.pretty_print)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    sizes = [path.stat().st_size / 1e6 for path in (arguments.input, arguments.output)]
    print(f"{arguments.output}: {len(data['images'])} images, {len(data['annotations'])} boxes")
    print(f"{sizes[0]:.1f} MB in, {sizes[1]:.1f} MB out")


if __name__ == "__main__":
    main()
