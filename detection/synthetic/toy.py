"""Draw a small data set in COCO 2017's layout: discs, squares and triangles on soft backgrounds.

    python -m detection.synthetic.toy DIR [--train-images 400] [--val-images 64] [--seed 0]

Each picture is a function of (seed, split, index): the same seed gives the same bytes on the same Pillow and
NumPy. A shape is drawn from the very polygon that its annotation holds. Colours are RGB, 0 to 255.
"""

import argparse
import colorsys
import json
import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from detection.config.settings import InputError

SUPERSAMPLING = 4  # outlines are drawn this much larger and averaged
JPEG_QUALITY = 90
CROWD_DISC_PX = (9.0, 17.0)
MARGIN_PX = 2

CONTRIBUTOR = "detection.synthetic.toy"  # who drew it, in `info`
PARTS = ("annotations", "train2017", "val2017")
SCRATCH = ".drawing-"  # the beginning of the names of drawings in progress

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Shape:
    """A category: its outline and its family of colours."""

    id: int
    name: str
    hue: float
    """The middle of its hues, 0 to 1 around the colour circle."""


DISC = Shape(1, "disc", hue=0.01)
SQUARE = Shape(2, "square", hue=0.59)
TRIANGLE = Shape(3, "triangle", hue=0.20)
SHAPES = (DISC, SQUARE, TRIANGLE)


@dataclass(frozen=True)
class Drawing:
    """What a data set is drawn from; recorded in the `info` of its annotation files."""

    train_images: int = 400
    val_images: int = 64
    seed: int = 0
    version: str = "2"  # changed with the pictures, so that old ones are drawn again

    def info(self) -> dict[str, Any]:
        """The `info` of a COCO annotation file."""
        return {
            "description": "Pictures drawn by detection.synthetic.toy. This is not COCO.",
            "contributor": CONTRIBUTOR,
            **asdict(self),
        }


def draw(folder: Path, drawing: Drawing) -> bool:
    """Draw the data set into `folder`, or find it there; True if it was drawn.

    It is drawn aside and moved into place, so that what broke off is never taken for done. A drawing with
    other parameters is replaced. Raises InputError if the folder holds anything else.
    """
    if folder.exists() and not _is_ours(folder):
        raise InputError(f"{folder} holds something other than drawn pictures. Name a new or an empty folder.")
    if _is_complete(folder, drawing):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    # Inside the folder, which may be a mount point: nothing can be renamed onto one.
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
        fresh, old = Path(scratch, "fresh"), Path(scratch, "old")
        old.mkdir()
        for part in PARTS:
            (fresh / part).mkdir(parents=True)
        total = drawing.train_images + drawing.val_images
        with tqdm(total=total, desc=f"drawing {folder}", unit="img", disable=None, leave=False) as progress:
            _draw_split(fresh, "train", drawing, drawing.train_images, 1, progress)
            _draw_split(fresh, "val", drawing, drawing.val_images, 1 + drawing.train_images, progress)
        if _is_complete(folder, drawing):
            return False  # another process, on another node perhaps, was faster
        for part in PARTS:  # the annotations go first and come last: nothing is taken for done without them
            if (folder / part).exists():
                (folder / part).rename(old / part)
        for part in reversed(PARTS):
            (fresh / part).rename(folder / part)
    return True


def _is_ours(folder: Path) -> bool:
    """Whether the folder holds nothing but pictures of this module and drawings that broke off."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir() if not path.name.startswith(SCRATCH)}
    drawn = all(info.get("contributor") == CONTRIBUTOR for info in infos(folder))
    return not names or (names <= set(PARTS) and drawn)


def _is_complete(folder: Path, drawing: Drawing) -> bool:
    if any(info != drawing.info() for info in infos(folder)):
        return False
    counts = [len(list((folder / f"{split}2017").glob("*.jpg"))) for split in ("train", "val")]
    return counts == [drawing.train_images, drawing.val_images]


def infos(folder: Path) -> list[dict[str, Any]]:
    """The `info` of both annotation files; empty where there is none."""
    return [read_info(annotation_file(folder, split)) for split in ("train", "val")]


def read_info(file: Path) -> dict[str, Any]:
    """The `info` that an annotation file begins with, its long rest unread; empty if it begins otherwise."""
    try:
        with file.open() as opened:
            return dict(json.JSONDecoder().raw_decode(opened.read(4096).removeprefix('{"info": '))[0])
    except (OSError, ValueError, TypeError):
        return {}


def annotation_file(folder: Path, split: str) -> Path:
    """Where COCO 2017's layout has the annotations of "train" or "val"."""
    return folder / "annotations" / f"instances_{split}2017.json"


def _draw_split(
    folder: Path, split: str, drawing: Drawing, num_images: int, first_id: int, progress: "tqdm[Any]"
) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    image_folder = folder / f"{split}2017"
    stream = {"train": 0, "val": 1}[split]
    order = np.random.default_rng([drawing.seed, stream]).permutation(num_images)
    num_empty, num_crowds = round(0.05 * num_images), max(1, round(0.03 * num_images))
    empty, crowded = set(order[:num_empty]), set(order[num_empty : num_empty + num_crowds])
    for index in range(num_images):
        rng = np.random.default_rng([drawing.seed, stream, index])
        image_id = first_id + index
        file_name = f"{image_id:012}.jpg"
        picture, objects = _draw_picture(rng, with_objects=index not in empty, with_crowd=index in crowded)
        picture.save(image_folder / file_name, quality=JPEG_QUALITY)
        images.append(
            {
                "id": image_id,
                "file_name": file_name,
                "width": picture.width,
                "height": picture.height,
                "license": 1,
            }
        )
        annotations += [{"id": len(annotations) + i, "image_id": image_id, **o} for i, o in enumerate(objects, 1)]
        progress.update()
    content = {
        "info": drawing.info(),
        "licenses": [
            {"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"},
        ],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": shape.id, "name": shape.name, "supercategory": "shape"} for shape in SHAPES],
    }
    annotation_file(folder, split).write_text(json.dumps(content))


def _draw_picture(
    rng: np.random.Generator, *, with_objects: bool, with_crowd: bool
) -> tuple[Image.Image, list[dict[str, Any]]]:
    """One picture and its annotations, without ids."""
    long_px, short_px = int(rng.integers(320, 401)), int(rng.integers(240, 321))
    height, width = (short_px, long_px) if rng.random() < 0.65 else (long_px, short_px)
    canvas = _background(rng, height, width)
    taken = np.zeros((height, width), dtype=bool)
    annotations: list[dict[str, Any]] = []
    if with_crowd:
        annotations.append(_draw_crowd(rng, canvas, taken))
    if with_objects:
        for _ in range(rng.integers(3, 8)):
            shape = SHAPES[rng.integers(len(SHAPES))]
            small = rng.random() < 0.08
            size_px = short_px * (rng.uniform(0.10, 0.20) if small else rng.uniform(0.22, 0.45))
            annotations += _draw_object(rng, canvas, taken, shape, size_px)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8)), annotations


def _background(rng: np.random.Generator, height: int, width: int) -> Floats:
    """(height, width, 3): a few muted colours that run into each other, with grain."""
    hue, value = rng.random(), rng.uniform(0.45, 0.9)
    colours = [rgb(hue + rng.normal(0, 0.1), rng.uniform(0.08, 0.3), value + rng.uniform(-0.15, 0.1)) for _ in range(9)]
    patches = Image.fromarray(np.array(colours).reshape(3, 3, 3).astype(np.uint8))
    canvas = np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    return canvas + _grain(rng, height, width, 3.0)


def _draw_object(
    rng: np.random.Generator, canvas: Floats, taken: NDArray[np.bool_], shape: Shape, size_px: float
) -> list[dict[str, Any]]:
    """Draw a shape where there is room for it and return its annotation; none where there is no room."""
    height, width = taken.shape
    outline = _outline(rng, shape)
    for _ in range(20):
        extent = np.ptp(outline, axis=0) * size_px
        corner = [rng.uniform(MARGIN_PX, side - MARGIN_PX - e) for side, e in zip((width, height), extent, strict=True)]
        polygon = np.round((outline - outline.min(axis=0)) * size_px + corner, 2)
        alpha, window = _stencil(polygon)
        if not (taken[window] & (alpha > 0)).any():
            break
        size_px *= 0.95
    else:
        return []
    taken[window] |= alpha > 0
    _shade(canvas, alpha, window)
    _paint(rng, canvas, alpha, window, shape)
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    return [
        {
            "category_id": shape.id,
            "bbox": [round(float(v), 2) for v in (*low, *(high - low))],
            "area": round(_area(polygon), 2),
            "segmentation": [polygon.ravel().tolist()],
            "iscrowd": 0,
        }
    ]


def _draw_crowd(rng: np.random.Generator, canvas: Floats, taken: NDArray[np.bool_]) -> dict[str, Any]:
    """Draw a cluster of small discs that are annotated as one crowd, as COCO does from ten objects on."""
    height, width = taken.shape
    outline = _outline(rng, DISC)
    crowd = np.zeros_like(taken)
    centre = np.array([width, height]) * rng.uniform(0.3, 0.7, size=2)
    spread_px = 0.09 * min(height, width)
    for _ in range(rng.integers(25, 40)):
        size_px = rng.uniform(*CROWD_DISC_PX)
        reach = np.array([width, height]) - size_px - MARGIN_PX
        corner = np.clip(rng.normal(centre, spread_px) - size_px / 2, MARGIN_PX, reach)
        alpha, window = _stencil((outline - outline.min(axis=0)) * size_px + corner)
        if not (crowd[window] & (alpha > 0.5)).any():
            crowd[window] |= alpha > 0.5
            taken[window] |= alpha > 0
            _paint(rng, canvas, alpha, window, DISC)
    rows, columns = np.flatnonzero(crowd.any(axis=1)), np.flatnonzero(crowd.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return {
        "category_id": DISC.id,
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(crowd.sum()),
        "segmentation": {"size": [height, width], "counts": run_lengths(crowd)},
        "iscrowd": 1,
    }


def _outline(rng: np.random.Generator, shape: Shape) -> NDArray[np.float64]:
    """(V, 2) corners x, y of a turned shape, the longer side of its box 1."""
    if shape is DISC:
        angles = np.arange(60) * (2 * math.pi / 60)
    elif shape is SQUARE:
        angles = math.pi / 4 + np.arange(4) * (math.pi / 2) + rng.uniform(-math.pi / 7, math.pi / 7)
    else:
        angles = np.array([0, 1, 2]) * (2 * math.pi / 3) + rng.uniform(-0.25, 0.25, size=3)
        angles += rng.uniform(0, 2 * math.pi)
    corners: NDArray[np.float64] = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return corners / float(np.ptp(corners, axis=0).max())


def _stencil(polygon: NDArray[np.float64]) -> tuple[Floats, tuple[slice, slice]]:
    """How much of each pixel the polygon covers (0 to 1), and the window (rows, columns) that it lies in."""
    x0, y0 = np.floor(polygon.min(axis=0)).astype(int) - 1
    x1, y1 = np.ceil(polygon.max(axis=0)).astype(int) + 1
    large = Image.new("L", ((x1 - x0) * SUPERSAMPLING, (y1 - y0) * SUPERSAMPLING))
    corners = (polygon - (x0, y0)) * SUPERSAMPLING
    ImageDraw.Draw(large).polygon([tuple(corner) for corner in corners.tolist()], fill=255)
    alpha = np.asarray(large.reduce(SUPERSAMPLING), dtype=np.float32) * np.float32(1 / 255)
    return alpha, (slice(y0, y1), slice(x0, x1))


def _shade(canvas: Floats, alpha: Floats, window: tuple[slice, slice]) -> None:
    """Darken the ground below and right of a shape, softly."""
    rows, columns = window
    pad, offset = 12, 4
    padded = Image.fromarray((np.pad(alpha, pad) * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(4))
    shadow = np.asarray(padded, dtype=np.float32) * (0.35 / 255)
    top, left = rows.start + offset - pad, columns.start + offset - pad
    y0, x0 = max(top, 0), max(left, 0)
    ground = canvas[y0 : top + shadow.shape[0], x0 : left + shadow.shape[1]]
    visible = shadow[y0 - top :, x0 - left :][: ground.shape[0], : ground.shape[1]]
    ground *= 1 - visible[..., None]


def _paint(rng: np.random.Generator, canvas: Floats, alpha: Floats, window: tuple[slice, slice], shape: Shape) -> None:
    """Fill a stencil with a gradient between two colours of the shape's family, with grain."""
    height, width = alpha.shape
    hue, saturation, value = shape.hue + rng.normal(0, 0.02), rng.uniform(0.6, 0.9), rng.uniform(0.7, 1.0)
    light = np.array(rgb(hue + 0.02, saturation - 0.15, min(value + 0.15, 1)), dtype=np.float32)
    dark = np.array(rgb(hue - 0.02, saturation, value - 0.2), dtype=np.float32)
    angle = rng.uniform(0, math.pi / 2)  # the light comes from above and left, as the shadow says
    across = np.linspace(0, math.cos(angle), width, dtype=np.float32)
    down = np.linspace(0, math.sin(angle), height, dtype=np.float32)[:, None]
    depth = ((across + down) / (math.cos(angle) + math.sin(angle)))[..., None]
    colour = light + (dark - light) * depth + _grain(rng, height, width, 4.0)
    canvas[window] += alpha[..., None] * (colour - canvas[window])


def _grain(rng: np.random.Generator, height: int, width: int, sigma: float) -> Floats:
    return sigma * rng.standard_normal((height, width, 1), dtype=np.float32)


def rgb(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    """Red, green and blue, 0 to 255 each, of a hue on the circle of length 1; a value beyond 0 to 1 is cut."""
    r, g, b = colorsys.hsv_to_rgb(hue % 1, saturation, max(0.0, min(value, 1.0)))
    return 255 * r, 255 * g, 255 * b


def _area(polygon: NDArray[np.float64]) -> float:
    x, y = polygon.T
    return 0.5 * abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed run lengths: down the columns, 0s and 1s in turn, beginning with the 0s."""
    pixels = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(pixels, prepend=False))
    return [int(n) for n in np.diff(changes, prepend=0, append=len(pixels))]


def positive(text: str) -> int:
    """A whole number from 1 up, for argparse."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m detection.synthetic.toy", description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="DIR", type=Path, help="new or empty, or an older drawing")
    parser.add_argument("--train-images", metavar="N", type=positive, default=Drawing.train_images)
    parser.add_argument("--val-images", metavar="N", type=positive, default=Drawing.val_images)
    parser.add_argument("--seed", metavar="N", type=int, default=Drawing.seed, help="0 or more")
    arguments = parser.parse_args()
    if arguments.seed < 0:
        parser.error(f"argument --seed: {arguments.seed} is below 0")
    drawing = Drawing(arguments.train_images, arguments.val_images, arguments.seed)
    what = f"{drawing.train_images} + {drawing.val_images} pictures (seed {drawing.seed})"
    start = time.perf_counter()
    try:
        drawn = draw(arguments.folder, drawing)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {arguments.folder} cannot be written: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - start
    print(f"{arguments.folder}: drew {what} in {seconds:.1f} s" if drawn else f"{arguments.folder}: has {what} already")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
