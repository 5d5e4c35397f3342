"""Small synthetic data set in COCO 2017's layout: discs, squares and triangles on soft backgrounds.

    python -m detection.synthetic.toy DIR [--train-images 400] [--val-images 64] [--seed 0]

Each image is a function of (seed, split, index). The same seed gives the same bytes with the same versions of Pillow
and NumPy. A shape is rasterized from the polygon in its annotation. Colors are RGB, 0 to 255.
"""

import colorsys
import json
import math
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from detection.arguments import parse_positive
from detection.config.settings import InputError
from detection.synthetic import generated_dir
from detection.synthetic.generated_dir import LICENSES, SUBDIRS, TMP_PREFIX, annotation_path
from mlperf import stdio

SUPERSAMPLING = 4  # polygons are rasterized at this scale and averaged
JPEG_QUALITY = 90
CROWD_DISC_PX = (9.0, 17.0)
MARGIN_PX = 2

GENERATOR = generated_dir.Generator("detection.synthetic.toy", earlier_names=("detection.toy",))

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Shape:
    """Category with its range of hues."""

    id: int
    name: str
    hue: float
    """Mean hue, 0 to 1 around the color circle."""


DISC = Shape(1, "disc", hue=0.01)
SQUARE = Shape(2, "square", hue=0.59)
TRIANGLE = Shape(3, "triangle", hue=0.20)
SHAPES = (DISC, SQUARE, TRIANGLE)


@dataclass(frozen=True)
class ToySpec:
    """Parameters of a data set, recorded in the `info` of its annotation files."""

    train_images: int = 400
    val_images: int = 64
    seed: int = 0
    version: str = "2"  # changed with the images, so that existing ones are replaced

    def info(self) -> dict[str, Any]:
        """Return the `info` of a COCO annotation file."""
        return {"description": GENERATOR.description, "contributor": GENERATOR.name, **asdict(self)}


def generate(data_dir: Path, spec: ToySpec) -> bool:
    """Generate the data set in `data_dir` unless it is complete. Return whether it was generated.

    The files are moved into place at the end, so an interrupted data set is never mistaken for a complete one.
    A data set with other parameters is replaced. Raise InputError if the folder holds anything else.
    """
    if data_dir.exists() and not _is_owned(data_dir):
        raise InputError(f"{data_dir} holds something other than synthetic images. Name a new or an empty folder.")
    if _is_complete(data_dir, spec):
        return False
    data_dir.mkdir(parents=True, exist_ok=True)
    # Inside the folder, which may be a mount point: nothing can be renamed onto one.
    with tempfile.TemporaryDirectory(prefix=TMP_PREFIX, dir=data_dir) as tmp:
        new, old = Path(tmp, "new"), Path(tmp, "old")
        old.mkdir()
        for subdir in SUBDIRS:
            (new / subdir).mkdir(parents=True)
        total = spec.train_images + spec.val_images
        with tqdm(total=total, desc=f"generating {data_dir}", unit="img", disable=None, leave=False) as progress:
            _generate_split(new, "train", spec, spec.train_images, 1, progress)
            _generate_split(new, "val", spec, spec.val_images, 1 + spec.train_images, progress)
        if _is_complete(data_dir, spec):
            return False  # another process, perhaps on another node, was faster
        # The annotations leave first and return last: without them the data set is incomplete.
        for subdir in SUBDIRS:
            if (data_dir / subdir).exists():
                (data_dir / subdir).rename(old / subdir)
        for subdir in reversed(SUBDIRS):
            (new / subdir).rename(data_dir / subdir)
    return True


def _is_owned(data_dir: Path) -> bool:
    """Return whether the folder holds nothing but data sets of this module, complete or interrupted."""
    if not data_dir.is_dir():
        return False
    names, infos = generated_dir.file_names(data_dir), generated_dir.read_infos(data_dir)
    return not names or (names <= set(SUBDIRS) and all(map(GENERATOR.owns, infos)))


def _is_complete(data_dir: Path, spec: ToySpec) -> bool:
    for info in generated_dir.read_infos(data_dir):
        if not (GENERATOR.owns(info) and asdict(spec).items() <= info.items()):
            return False
    counts = [len(list((data_dir / f"{split}2017").glob("*.jpg"))) for split in ("train", "val")]
    return counts == [spec.train_images, spec.val_images]


def _generate_split(
    data_dir: Path, split: str, spec: ToySpec, num_images: int, first_id: int, progress: "tqdm[Any]"
) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    image_dir = data_dir / f"{split}2017"
    stream = {"train": 0, "val": 1}[split]
    order = np.random.default_rng([spec.seed, stream]).permutation(num_images)
    num_empty, num_crowds = round(0.05 * num_images), max(1, round(0.03 * num_images))
    empty_indices, crowd_indices = set(order[:num_empty]), set(order[num_empty : num_empty + num_crowds])
    for index in range(num_images):
        rng = np.random.default_rng([spec.seed, stream, index])
        image_id = first_id + index
        file_name = f"{image_id:012}.jpg"
        image, objects = _draw_image(rng, with_objects=index not in empty_indices, with_crowd=index in crowd_indices)
        image.save(image_dir / file_name, quality=JPEG_QUALITY)
        row = {"id": image_id, "file_name": file_name, "width": image.width, "height": image.height, "license": 1}
        images.append(row)
        annotations += [{"id": len(annotations) + i, "image_id": image_id, **o} for i, o in enumerate(objects, 1)]
        progress.update()
    content = {
        "info": spec.info(),
        "licenses": LICENSES,
        "images": images,
        "annotations": annotations,
        "categories": [{"id": shape.id, "name": shape.name, "supercategory": "shape"} for shape in SHAPES],
    }
    annotation_path(data_dir, split).write_text(json.dumps(content))


def _draw_image(
    rng: np.random.Generator, *, with_objects: bool, with_crowd: bool
) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Return an image and its annotations without ids."""
    long_px, short_px = int(rng.integers(320, 401)), int(rng.integers(240, 321))
    height, width = (short_px, long_px) if rng.random() < 0.65 else (long_px, short_px)
    canvas = _make_background(rng, height, width)
    occupied = np.zeros((height, width), dtype=bool)
    annotations: list[dict[str, Any]] = []
    if with_crowd:
        annotations.append(_draw_crowd(rng, canvas, occupied))
    if with_objects:
        for _ in range(rng.integers(3, 8)):
            shape = SHAPES[rng.integers(len(SHAPES))]
            is_small = rng.random() < 0.08
            size_px = short_px * (rng.uniform(0.10, 0.20) if is_small else rng.uniform(0.22, 0.45))
            annotations += _draw_object(rng, canvas, occupied, shape, size_px)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8)), annotations


def _make_background(rng: np.random.Generator, height: int, width: int) -> Floats:
    """Return blended muted colors with noise, (height, width, 3)."""
    hue, value = rng.random(), rng.uniform(0.45, 0.9)
    colors = [
        hsv_to_rgb(hue + rng.normal(0, 0.1), rng.uniform(0.08, 0.3), value + rng.uniform(-0.15, 0.1)) for _ in range(9)
    ]
    patches = Image.fromarray(np.array(colors).reshape(3, 3, 3).astype(np.uint8))
    canvas = np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    return canvas + _noise(rng, height, width, 3.0)


def _draw_object(
    rng: np.random.Generator, canvas: Floats, occupied: NDArray[np.bool_], shape: Shape, size_px: float
) -> list[dict[str, Any]]:
    """Draw a shape in free space. Return its annotation in a list, which is empty if there is no space."""
    height, width = occupied.shape
    unit_polygon = _sample_polygon(rng, shape)
    for _ in range(20):
        extent = np.ptp(unit_polygon, axis=0) * size_px
        corner = [rng.uniform(MARGIN_PX, side - MARGIN_PX - e) for side, e in zip((width, height), extent, strict=True)]
        polygon = np.round((unit_polygon - unit_polygon.min(axis=0)) * size_px + corner, 2)
        alpha, window = _rasterize(polygon)
        if not (occupied[window] & (alpha > 0)).any():
            break
        size_px *= 0.95
    else:
        return []
    occupied[window] |= alpha > 0
    _draw_shadow(canvas, alpha, window)
    _fill(rng, canvas, alpha, window, shape)
    lower, upper = polygon.min(axis=0), polygon.max(axis=0)
    return [
        {
            "category_id": shape.id,
            "bbox": [round(float(v), 2) for v in (*lower, *(upper - lower))],
            "area": round(_polygon_area(polygon), 2),
            "segmentation": [polygon.ravel().tolist()],
            "iscrowd": 0,
        }
    ]


def _draw_crowd(rng: np.random.Generator, canvas: Floats, occupied: NDArray[np.bool_]) -> dict[str, Any]:
    """Draw a cluster of small discs, annotated as one crowd, as COCO does for ten objects or more."""
    height, width = occupied.shape
    unit_polygon = _sample_polygon(rng, DISC)
    crowd = np.zeros_like(occupied)
    center = np.array([width, height]) * rng.uniform(0.3, 0.7, size=2)
    spread_px = 0.09 * min(height, width)
    for _ in range(rng.integers(25, 40)):
        size_px = rng.uniform(*CROWD_DISC_PX)
        limit = np.array([width, height]) - size_px - MARGIN_PX
        corner = np.clip(rng.normal(center, spread_px) - size_px / 2, MARGIN_PX, limit)
        alpha, window = _rasterize((unit_polygon - unit_polygon.min(axis=0)) * size_px + corner)
        if not (crowd[window] & (alpha > 0.5)).any():
            crowd[window] |= alpha > 0.5
            occupied[window] |= alpha > 0
            _fill(rng, canvas, alpha, window, DISC)
    rows, columns = np.flatnonzero(crowd.any(axis=1)), np.flatnonzero(crowd.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return {
        "category_id": DISC.id,
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(crowd.sum()),
        "segmentation": {"size": [height, width], "counts": encode_rle_counts(crowd)},
        "iscrowd": 1,
    }


def _sample_polygon(rng: np.random.Generator, shape: Shape) -> NDArray[np.float64]:
    """Return the corners x, y (V, 2) of a rotated shape. The longer side of its box is 1."""
    if shape is DISC:
        angles = np.arange(60) * (2 * math.pi / 60)
    elif shape is SQUARE:
        angles = math.pi / 4 + np.arange(4) * (math.pi / 2) + rng.uniform(-math.pi / 7, math.pi / 7)
    else:
        angles = np.array([0, 1, 2]) * (2 * math.pi / 3) + rng.uniform(-0.25, 0.25, size=3)
        angles += rng.uniform(0, 2 * math.pi)
    corners: NDArray[np.float64] = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return corners / float(np.ptp(corners, axis=0).max())


def _rasterize(polygon: NDArray[np.float64]) -> tuple[Floats, tuple[slice, slice]]:
    """Return the coverage of each pixel by the polygon, 0 to 1, and the window (rows, columns) of these pixels."""
    x0, y0 = np.floor(polygon.min(axis=0)).astype(int) - 1
    x1, y1 = np.ceil(polygon.max(axis=0)).astype(int) + 1
    bitmap = Image.new("L", ((x1 - x0) * SUPERSAMPLING, (y1 - y0) * SUPERSAMPLING))
    corners = (polygon - (x0, y0)) * SUPERSAMPLING
    ImageDraw.Draw(bitmap).polygon([tuple(corner) for corner in corners.tolist()], fill=255)
    alpha = np.asarray(bitmap.reduce(SUPERSAMPLING), dtype=np.float32) * np.float32(1 / 255)
    return alpha, (slice(y0, y1), slice(x0, x1))


def _draw_shadow(canvas: Floats, alpha: Floats, window: tuple[slice, slice]) -> None:
    """Draw a soft shadow below and right of a shape."""
    rows, columns = window
    pad, offset = 12, 4
    padded = Image.fromarray((np.pad(alpha, pad) * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(4))
    shadow = np.asarray(padded, dtype=np.float32) * (0.35 / 255)
    top, left = rows.start + offset - pad, columns.start + offset - pad
    y0, x0 = max(top, 0), max(left, 0)
    ground = canvas[y0 : top + shadow.shape[0], x0 : left + shadow.shape[1]]
    visible = shadow[y0 - top :, x0 - left :][: ground.shape[0], : ground.shape[1]]
    ground *= 1 - visible[..., None]


def _fill(rng: np.random.Generator, canvas: Floats, alpha: Floats, window: tuple[slice, slice], shape: Shape) -> None:
    """Fill a shape with a noisy gradient between two colors around its hue."""
    height, width = alpha.shape
    hue, saturation, value = shape.hue + rng.normal(0, 0.02), rng.uniform(0.6, 0.9), rng.uniform(0.7, 1.0)
    light = np.array(hsv_to_rgb(hue + 0.02, saturation - 0.15, min(value + 0.15, 1)), dtype=np.float32)
    dark = np.array(hsv_to_rgb(hue - 0.02, saturation, value - 0.2), dtype=np.float32)
    angle = rng.uniform(0, math.pi / 2)  # light from above and left, consistent with the shadow
    x_ramp = np.linspace(0, math.cos(angle), width, dtype=np.float32)
    y_ramp = np.linspace(0, math.sin(angle), height, dtype=np.float32)[:, None]
    depth = ((x_ramp + y_ramp) / (math.cos(angle) + math.sin(angle)))[..., None]
    color = light + (dark - light) * depth + _noise(rng, height, width, 4.0)
    canvas[window] += alpha[..., None] * (color - canvas[window])


def _noise(rng: np.random.Generator, height: int, width: int, sigma: float) -> Floats:
    return sigma * rng.standard_normal((height, width, 1), dtype=np.float32)


def hsv_to_rgb(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    """Return RGB in 0 to 255. The hue has period 1, and the value is clipped to 0 to 1."""
    r, g, b = colorsys.hsv_to_rgb(hue % 1, saturation, max(0.0, min(value, 1.0)))
    return 255 * r, 255 * g, 255 * b


def _polygon_area(polygon: NDArray[np.float64]) -> float:
    x, y = polygon.T
    return 0.5 * abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))


def encode_rle_counts(mask: NDArray[np.bool_]) -> list[int]:
    """Return COCO's uncompressed RLE counts: by column, alternating zeros and ones, zeros first."""
    pixels = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(pixels, prepend=False))
    return [int(n) for n in np.diff(changes, prepend=0, append=len(pixels))]


def _main() -> int:
    parser = generated_dir.make_parser(GENERATOR, "Generate a small data set in COCO 2017's layout.")
    parser.add_argument("--train-images", metavar="N", type=parse_positive, default=ToySpec.train_images)
    parser.add_argument("--val-images", metavar="N", type=parse_positive, default=ToySpec.val_images)
    arguments = parser.parse_args()
    spec = ToySpec(arguments.train_images, arguments.val_images, arguments.seed)
    content = f"{spec.train_images} + {spec.val_images} images (seed {spec.seed})"
    return generated_dir.run(arguments.data_dir, content, lambda: generate(arguments.data_dir, spec))


if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(_main())
