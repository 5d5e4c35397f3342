"""Draw what a run detected beside the truth: python -m perf.draw RUN_FOLDER OUT.png [--images 8] [--score .4]

Takes the first evaluation images of the run's data set and the detections of its last evaluation.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from detection import coco, drawing
from detection.drawing import Mark

TILE_PX = 300
COLUMNS = 4


def main(argv: list[str]) -> None:
    """Draw a sheet of tiles."""
    parser = argparse.ArgumentParser(prog="python -m perf.draw", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("out", type=Path, help="picture to write")
    parser.add_argument("--images", type=int, default=8, help="how many")
    parser.add_argument("--score", type=float, default=0.4, help="detections below are left out")
    arguments = parser.parse_args(argv)
    config = json.loads((arguments.run / "config.json").read_text())
    detections = json.loads((arguments.run / "detections.json").read_text())
    named = config.get("val_annotations")
    files = (Path(named), Path(config["val_images"])) if named else coco.layout(Path(config["data_dir"]), "val")
    split = coco.read(*files)
    rows = -(-arguments.images // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE_PX, rows * TILE_PX), "white")
    for index in range(arguments.images):
        of_image = [d for d in detections if d["image_id"] == split.image_ids[index]]
        tile = draw(split, index, [d for d in of_image if d["score"] >= arguments.score])
        sheet.paste(tile, (index % COLUMNS * TILE_PX, index // COLUMNS * TILE_PX))
    sheet.save(arguments.out)


def draw(split: coco.Split, index: int, detections: list[dict[str, Any]]) -> Image.Image:
    """A square tile of one image; detections in colour with name and score, the truth in thin white."""
    with Image.open(split.image_path(index)) as image:
        size_wh = image.size
        tile = image.convert("RGB").resize((TILE_PX, TILE_PX))
    scale = [TILE_PX / side for side in size_wh] * 2
    pen = ImageDraw.Draw(tile)
    for box in split.boxes(index):
        pen.rectangle([float(side) * factor for side, factor in zip(box, scale, strict=True)], outline="white")
    labels = {category.id: label for label, category in enumerate(split.categories, start=1)}
    marks = []
    for detection in detections:
        label = labels[detection["category_id"]]
        left, top, width, height = (side * factor for side, factor in zip(detection["bbox"], scale, strict=True))
        text = f"{split.categories[label - 1].name} {detection['score']:.2f}"
        marks.append(Mark((left, top, left + width, top + height), label, text))
    return drawing.draw(tile, marks)


if __name__ == "__main__":
    main(sys.argv[1:])
