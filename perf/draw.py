"""Draw what a run detected beside the truth: python -m perf.draw RUN_FOLDER OUT.png [--images 8] [--score .4]

Takes the first evaluation images of the run's data set and the detections of its last evaluation.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from detection import coco

TILE_PX = 300
COLUMNS = 4
COLOURS = ("#ff2d95", "#00e5ff", "#ffd400", "#7cff4f", "#b388ff", "#ff8a3d")


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
    split = coco.read(*coco.layout(Path(config["data_dir"]), "val"))
    rows = -(-arguments.images // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE_PX, rows * TILE_PX), "white")
    for index in range(arguments.images):
        of_image = [d for d in detections if d["image_id"] == split.image_ids[index]]
        tile = draw(split, index, [d for d in of_image if d["score"] >= arguments.score])
        sheet.paste(tile, (index % COLUMNS * TILE_PX, index // COLUMNS * TILE_PX))
    sheet.save(arguments.out)


def draw(split: coco.Split, index: int, detections: list[dict[str, Any]]) -> Image.Image:
    """A square tile of one image; detections in colour with name and score, the truth in thin white."""
    image = Image.open(split.image_path(index)).convert("RGB")
    scale = (TILE_PX / image.width, TILE_PX / image.height)
    tile = image.resize((TILE_PX, TILE_PX))
    pen = ImageDraw.Draw(tile)
    font = ImageFont.load_default(size=12)
    for left, top, right, bottom in split.boxes(index):
        pen.rectangle((left * scale[0], top * scale[1], right * scale[0], bottom * scale[1]), outline="white")
    labels = {category.id: label for label, category in enumerate(split.categories)}
    for detection in detections:
        label = labels[detection["category_id"]]
        left, top, width, height = detection["bbox"]
        corners = (left * scale[0], top * scale[1], (left + width) * scale[0], (top + height) * scale[1])
        colour = COLOURS[label % len(COLOURS)]
        pen.rectangle(corners, outline=colour, width=3)
        text = f"{split.categories[label].name} {detection['score']:.2f}"
        place = (max(corners[0], 0), max(corners[1] - 14, 0))
        pen.rectangle(pen.textbbox(place, text, font=font), fill=colour)
        pen.text(place, text, fill="black", font=font)
    return tile


if __name__ == "__main__":
    main(sys.argv[1:])
