"""Scenes of `detection.synthetic.coco_sized`: sizes, boxes, polygons and JPEGs distributed like COCO's.

Objects are lobed shapes, colored by category. Sources of the statistics: the annotation files of COCO 2017, its
detection challenge page ("41% small, 34% medium, 24% large"), Singh and Davis 2018 (object scales), and 160 of its
photos (image sizes, JPEGs, polygons).

Images come in shards. A shard is a function of (seed, split, shard), an image of (seed, split, index).

N images of a shard, M boxes, V corners of a polygon. Sizes and boxes in pixels.
"""

import io
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw

from detection.synthetic import backgrounds, toy
from detection.synthetic.backgrounds import CANVAS_PX, NOISE_HEADROOM, NUM_BACKGROUNDS, TILE_PX

TRAIN_IMAGES, VAL_IMAGES = 118_287, 5_000
EMPTY_RATE = {"train": (1_021, TRAIN_IMAGES), "val": (48, VAL_IMAGES)}  # images without boxes, all images
MAX_BOXES = 93  # in one image of train2017
BOXES_SCALE, BOXES_SHAPE = 6.49, 0.9  # Weibull, rounded up: mean 7.33 as in train2017, 99% below 36
CROWD_RATE = 10_052 / 117_266  # of the images with boxes, the fraction that has a crowd

# COCO's categories by supercategory: id, name, boxes in train2017 including crowds (860,001 in total).
CATEGORY_LINES = (
    "person: 1 person 262465",
    "vehicle: 2 bicycle 7113, 3 car 43867, 4 motorcycle 8725, 5 airplane 5135, 6 bus 6069, 7 train 4571, "
    "8 truck 9973, 9 boat 10759",
    "outdoor: 10 traffic light 12884, 11 fire hydrant 1865, 13 stop sign 1983, 14 parking meter 1285, 15 bench 9838",
    "animal: 16 bird 10806, 17 cat 4768, 18 dog 5508, 19 horse 6587, 20 sheep 9509, 21 cow 8147, 22 elephant 5513, "
    "23 bear 1294, 24 zebra 5303, 25 giraffe 5131",
    "accessory: 27 backpack 8720, 28 umbrella 11431, 31 handbag 12354, 32 tie 6496, 33 suitcase 6192",
    "sports: 34 frisbee 2682, 35 skis 6646, 36 snowboard 2685, 37 sports ball 6347, 38 kite 9076, "
    "39 baseball bat 3276, 40 baseball glove 3747, 41 skateboard 5543, 42 surfboard 6126, 43 tennis racket 4812",
    "kitchen: 44 bottle 24342, 46 wine glass 7913, 47 cup 20650, 48 fork 5479, 49 knife 7770, 50 spoon 6165, "
    "51 bowl 14358",
    "food: 52 banana 9458, 53 apple 5851, 54 sandwich 4373, 55 orange 6399, 56 broccoli 7308, 57 carrot 7852, "
    "58 hot dog 2918, 59 pizza 5821, 60 donut 7179, 61 cake 6353",
    "furniture: 62 chair 38491, 63 couch 5779, 64 potted plant 8652, 65 bed 4192, 67 dining table 15714, "
    "70 toilet 4157",
    "electronic: 72 tv 5805, 73 laptop 4970, 74 mouse 2262, 75 remote 5703, 76 keyboard 2855, 77 cell phone 6434",
    "appliance: 78 microwave 1673, 79 oven 3334, 80 toaster 225, 81 sink 5610, 82 refrigerator 2637",
    "indoor: 84 book 24715, 85 clock 6334, 86 vase 6613, 87 scissors 1481, 88 teddy bear 4793, 89 hair drier 198, "
    "90 toothbrush 1954",
)
# Categories sampled for an image, with repetition, for its boxes to choose from. About 3 of them differ.
CATEGORIES_PER_IMAGE = 5

# Most common sizes of COCO's photos (width, height, probability). The other photos have one of three longer sides.
SIZES = (
    (640, 480, 0.215),
    (640, 427, 0.135),
    (480, 640, 0.105),
    (640, 426, 0.065),
    (640, 428, 0.040),
    (500, 375, 0.035),
    (640, 640, 0.025),
    (426, 640, 0.025),
    (500, 333, 0.025),
    (427, 640, 0.020),
    (640, 424, 0.020),
    (612, 612, 0.015),
    (640, 360, 0.015),
    (375, 500, 0.010),
    (333, 500, 0.010),
)
OTHER_SIDES = ((640, 0.65), (500, 0.25), (400, 0.10))
OTHER_RATIO = (0.55, 0.9)  # of the shorter to the longer side
PORTRAIT_FRACTION = 0.3  # of the other photos

# Quantiles of the square root of an object's area, in pixels. 32 and 96 bound COCO's small and medium objects.
AREA_SIDES = ((0.0, 3.0), (0.1, 10.5), (0.25, 19.5), (0.41, 32.0), (0.755, 96.0), (0.9, 190.0), (0.99, 400.0), (1, 520))
MIN_SIDE_PX = 1.5
# Corners of the polygon of a large object. Smaller ones have a half or a third, which gives 21 on average as in COCO.
POLYGON_CORNERS = 36

NUM_CROWD_BLOBS = 24
CROWD_BLOB_PX = (8.0, 26.0)

# JPEG quality, probability, and mean bits per pixel. Of 160 photos, 68% have the tables of quality 96, 30% of 90 and 2%
# of 80, all baseline and 4:4:4. The result is 162 KB per image. train2017.zip has 163.
JPEGS = ((96, 0.68, 5.31), (90, 0.30, 3.02), (80, 0.02, 1.95))
LOG_BITS_STDDEV = 0.31  # of the logarithm of the bits per pixel
GRAYSCALE_FRACTION = 0.002  # a few hundred of COCO's images have one channel

SHARD_SIZE = 256  # images. Changing it changes every image.

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class CocoCategory:
    """COCO category and its number of boxes in train2017."""

    id: int
    name: str
    supercategory: str
    num_boxes: int


def _parse_line(line: str) -> list[CocoCategory]:
    supercategory, _, rest = line.partition(": ")
    rows = (row.split(" ") for row in rest.split(", "))
    return [CocoCategory(int(first), " ".join(name), supercategory, int(last)) for first, *name, last in rows]


COCO_CATEGORIES = tuple(category for line in CATEGORY_LINES for category in _parse_line(line))
CATEGORY_PROBS = np.array([category.num_boxes for category in COCO_CATEGORIES]) / sum(
    category.num_boxes for category in COCO_CATEGORIES
)


@dataclass(frozen=True, eq=False)
class ShardPlan:
    """Content of the images of one shard, and the parameters to render them."""

    seed: int
    split: str
    shard: int
    sizes_wh: Ints
    """(N, 2)."""
    box_offsets: Ints
    """(N + 1,): the boxes of image i are rows box_offsets[i] to box_offsets[i + 1]."""
    labels: Ints
    """(M,) indices of COCO_CATEGORIES."""
    polygons: Floats
    """(M, V, 2) corners x, y. Each run of `strides` consecutive corners repeats one corner."""
    strides: Ints
    """(M,)."""
    areas: Floats
    """(M,) of the polygons."""
    boxes_xywh: Floats
    """(M, 4) of the polygons."""
    colors: Ints
    """(M, 2, 3) RGB of the outer and the inner part."""
    crowd_polygons: dict[int, list[list[float]]]
    """Flat polygons x, y, x, y ... of a crowd, by the row of its box."""
    jpeg_qualities: Ints
    """(N,)."""
    noise_levels: Ints
    """(N,)."""
    is_grayscale: NDArray[np.bool_]
    """(N,)."""
    crops: Ints
    """(N, 5): index of the background, left and top of its crop, left and top of the noise crop."""


def plan_shard(seed: int, split: str, shard: int) -> ShardPlan:
    """Sample the content of a shard of "train" or "val"."""
    rng = _rng(seed, split, shard, purpose=1)
    sizes_wh = _sample_sizes_wh(seed, split, shard)
    counts = np.minimum(MAX_BOXES, np.ceil(BOXES_SCALE * rng.weibull(BOXES_SHAPE, SHARD_SIZE))).astype(np.int64)
    counts[[is_empty(split, shard * SHARD_SIZE + image) for image in range(SHARD_SIZE)]] = 0
    box_offsets = np.concatenate([[0], np.cumsum(counts)])
    image_index = np.repeat(np.arange(SHARD_SIZE), counts)
    num_boxes = len(image_index)

    candidates = rng.choice(len(COCO_CATEGORIES), size=(SHARD_SIZE, CATEGORIES_PER_IMAGE), p=CATEGORY_PROBS)
    labels = candidates[image_index, rng.integers(CATEGORIES_PER_IMAGE, size=num_boxes)]
    quantiles, sides = np.array(AREA_SIDES).T
    area_sides = np.exp(np.interp(rng.random(num_boxes), quantiles, np.log(sides)))
    strides = np.select([area_sides < 20, area_sides < 80], [3, 2], 1)

    shapes = _sample_shapes(rng, labels, strides)
    fill_fractions = _polygon_areas(shapes)
    # Some categories are tall and some wide. Persons are tall.
    log_aspect = np.where(labels == 0, -0.6, (labels * 7 % 11 - 5) * 0.1) + rng.normal(0, 0.5, num_boxes)
    extents_wh = np.exp(log_aspect[:, None] * [0.5, -0.5]) * (area_sides / np.sqrt(fill_fractions))[:, None]
    extents_wh = extents_wh.clip(MIN_SIDE_PX, sizes_wh[image_index])
    corners = rng.random((num_boxes, 2)) * (sizes_wh[image_index] - extents_wh)
    polygons = np.round(corners[:, None] + shapes * extents_wh[:, None], 2)
    lower, upper = polygons.min(axis=1), polygons.max(axis=1)

    colors = category_colors()[labels] + rng.integers(-12, 13, (num_boxes, 2, 3))
    has_crowd = (rng.random(SHARD_SIZE) < CROWD_RATE) & (counts > 0)
    crowd_polygons = {int(box_offsets[i]): _sample_crowd(rng, sizes_wh[i]) for i in np.flatnonzero(has_crowd)}

    quality, probs, bits = np.array(JPEGS).T
    jpeg_kinds = rng.choice(len(JPEGS), size=SHARD_SIZE, p=probs)
    bits_px = bits[jpeg_kinds] * np.exp(rng.normal(0, LOG_BITS_STDDEV, SHARD_SIZE) - LOG_BITS_STDDEV**2 / 2)
    crop_limits = [NUM_BACKGROUNDS, *(CANVAS_PX - sizes_wh.T), *(TILE_PX - sizes_wh.T)]
    return ShardPlan(
        seed=seed,
        split=split,
        shard=shard,
        sizes_wh=sizes_wh,
        box_offsets=box_offsets,
        labels=labels,
        polygons=polygons,
        strides=strides,
        areas=_polygon_areas(polygons).round(4),
        boxes_xywh=np.concatenate([lower, upper - lower], axis=1).round(2),
        colors=colors.clip(NOISE_HEADROOM, 255 - NOISE_HEADROOM),
        crowd_polygons=crowd_polygons,
        jpeg_qualities=quality[jpeg_kinds].astype(np.int64),
        noise_levels=backgrounds.pick_noise_levels(quality[jpeg_kinds], bits_px),
        is_grayscale=rng.random(SHARD_SIZE) < GRAYSCALE_FRACTION,
        crops=np.stack([rng.integers(n, size=SHARD_SIZE) for n in crop_limits], axis=1),
    )


def _rng(seed: int, split: str, shard: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, {"train": 0, "val": 1}[split], shard, purpose])


def is_empty(split: str, index: int) -> bool:
    """Return whether an image has no boxes. Empty images are evenly spaced, and the first comes early."""
    num_empty, num_images = EMPTY_RATE[split]
    return (index + 96) * num_empty // num_images > (index + 95) * num_empty // num_images


def _image_id(split: str, index: int) -> int:
    return 2 * index + {"train": 1, "val": 2}[split]


def file_name(split: str, index: int) -> str:
    """Return the file name of an image."""
    return f"{_image_id(split, index):012}.jpg"


def _sample_sizes_wh(seed: int, split: str, shard: int) -> Ints:
    """Return widths and heights (N, 2)."""
    rng = _rng(seed, split, shard, purpose=0)
    widths, heights, probs = np.array(SIZES).T
    size_index = rng.choice(len(SIZES) + 1, size=SHARD_SIZE, p=[*probs, 1 - probs.sum()])
    sides, side_probs = np.array(OTHER_SIDES).T
    longer = rng.choice(sides, size=SHARD_SIZE, p=side_probs)
    other_sizes_wh = np.stack([longer, longer * rng.uniform(*OTHER_RATIO, SHARD_SIZE)], axis=1)
    is_portrait = rng.random((SHARD_SIZE, 1)) < PORTRAIT_FRACTION
    other_sizes_wh = np.where(is_portrait, other_sizes_wh[:, ::-1], other_sizes_wh)
    sizes_wh = np.stack([[*widths, 0], [*heights, 0]], axis=1)[size_index]
    return np.where(sizes_wh > 0, sizes_wh, other_sizes_wh.round()).astype(np.int64)


def _sample_shapes(rng: np.random.Generator, labels: Ints, strides: Ints) -> Floats:
    """Return polygons (M, V, 2) in a box of side 1. Their number of lobes depends on the category."""
    num_boxes = len(labels)
    angles = np.arange(POLYGON_CORNERS) * (2 * math.pi / POLYGON_CORNERS)
    lobes = (2 + labels // 10)[:, None]
    depth, phase = rng.uniform(0, 0.4, (num_boxes, 1)), rng.uniform(0, 2 * math.pi, (num_boxes, 1))
    radii = 1 + depth * np.cos(lobes * angles + phase) + rng.normal(0, 0.04, (num_boxes, POLYGON_CORNERS))
    polygons = radii[..., None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    corners = np.arange(POLYGON_CORNERS) // strides[:, None] * strides[:, None]
    polygons = np.take_along_axis(polygons, corners[..., None], axis=1)
    lower = polygons.min(axis=1, keepdims=True)
    return (polygons - lower) / (polygons.max(axis=1, keepdims=True) - lower)


def _polygon_areas(polygons: Floats) -> Floats:
    """Return the areas (M,) of polygons (M, V, 2)."""
    x, y = polygons[..., 0], polygons[..., 1]
    return 0.5 * np.abs((x * np.roll(y, -1, axis=1) - y * np.roll(x, -1, axis=1)).sum(axis=1))


def _sample_crowd(rng: np.random.Generator, size_wh: Ints) -> list[list[float]]:
    """Return flat polygons of small blobs, scattered over a part of the image."""
    extent_wh = size_wh * rng.uniform([0.2, 0.1], [0.7, 0.4])
    corner = rng.random(2) * (size_wh - extent_wh)
    centers = corner + rng.random((NUM_CROWD_BLOBS, 1, 2)) * extent_wh
    radii = rng.uniform(*CROWD_BLOB_PX, (NUM_CROWD_BLOBS, 1, 1)) * [0.3, 0.5]
    angles = np.arange(12) * (math.pi / 6)
    polygons = centers + radii * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return [polygon.ravel().tolist() for polygon in polygons]


@cache
def category_colors() -> Ints:
    """Return the outer and inner color of each category, (80, 2, 3) RGB."""
    pairs = [
        [toy.hsv_to_rgb(label % 10 / 10, 0.75, 0.95), toy.hsv_to_rgb(label // 10 / 8 + 0.3, 0.75, 0.95)]
        for label in range(len(COCO_CATEGORIES))
    ]
    return np.array(pairs).round().astype(np.int64)


def make_image_rows(seed: int, split: str, shard: int) -> list[dict[str, Any]]:
    """Return the `images` of a shard."""
    rows = []
    for index, (width, height) in enumerate(_sample_sizes_wh(seed, split, shard).tolist(), shard * SHARD_SIZE):
        rows.append(
            {
                "license": 1,
                "file_name": file_name(split, index),
                "coco_url": "",
                "height": height,
                "width": width,
                "date_captured": "2026-11-21 00:00:00",
                "flickr_url": "",
                "id": _image_id(split, index),
            }
        )
    return rows


def make_annotation_rows(plan: ShardPlan, image: int) -> list[dict[str, Any]]:
    """Return the `annotations` of one image."""
    image_id = _image_id(plan.split, plan.shard * SHARD_SIZE + image)
    return [
        {
            **(_make_crowd_row(plan, image, row) if row in plan.crowd_polygons else _make_object_row(plan, row)),
            "image_id": image_id,
            "category_id": COCO_CATEGORIES[plan.labels[row]].id,
            "id": 100 * image_id + position,
        }
        for position, row in enumerate(range(plan.box_offsets[image], plan.box_offsets[image + 1]))
    ]


def _make_object_row(plan: ShardPlan, row: int) -> dict[str, Any]:
    return {
        "segmentation": [plan.polygons[row, :: plan.strides[row]].ravel().tolist()],
        "area": float(plan.areas[row]),
        "iscrowd": 0,
        "bbox": plan.boxes_xywh[row].tolist(),
    }


def _make_crowd_row(plan: ShardPlan, image: int, row: int) -> dict[str, Any]:
    width, height = plan.sizes_wh[image].tolist()
    bitmap = Image.new("L", (width, height))
    pen = ImageDraw.Draw(bitmap)
    for blob in plan.crowd_polygons[row]:
        pen.polygon(blob, fill=1)
    mask = np.asarray(bitmap) > 0
    box = bitmap.getbbox()
    assert box is not None, "the center of every blob is in the image"
    left, top, right, bottom = box
    return {
        "segmentation": {"counts": toy.encode_rle_counts(mask), "size": [height, width]},
        "area": int(mask.sum()),
        "iscrowd": 1,
        "bbox": [left, top, right - left, bottom - top],
    }


def render_jpeg(plan: ShardPlan, image: int) -> bytes:
    """Return one image as JPEG."""
    seed, (width, height) = plan.seed, plan.sizes_wh[image].tolist()
    background, left, top, noise_left, noise_top = plan.crops[image].tolist()
    canvas = backgrounds.make_backgrounds(seed)[background].crop((left, top, left + width, top + height))
    pen = ImageDraw.Draw(canvas)
    rows = range(plan.box_offsets[image], plan.box_offsets[image + 1])
    for row in sorted(rows, key=lambda row: -plan.areas[row]):  # small objects on top of large ones
        outer, inner = (tuple(color) for color in plan.colors[row].tolist())
        if row in plan.crowd_polygons:
            for blob in plan.crowd_polygons[row]:
                pen.polygon(blob, fill=outer)
            continue
        polygon = plan.polygons[row, :: plan.strides[row]]
        pen.polygon(polygon.ravel().tolist(), fill=outer)
        center = plan.boxes_xywh[row, :2] + plan.boxes_xywh[row, 2:] / 2
        pen.polygon(((polygon + center) / 2).ravel().tolist(), fill=inner)
    noise = backgrounds.make_noise(seed, int(plan.noise_levels[image]))
    noise_crop = noise.crop((noise_left, noise_top, noise_left + width, noise_top + height))
    canvas = ImageChops.add_modulo(canvas, noise_crop)
    if plan.is_grayscale[image]:
        canvas = canvas.convert("L")
    encoded = io.BytesIO()
    canvas.save(encoded, "JPEG", quality=int(plan.jpeg_qualities[image]), subsampling=0)
    return encoded.getvalue()
