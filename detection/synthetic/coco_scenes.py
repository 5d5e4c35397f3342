"""What is in the pictures of `detection.synthetic.coco_sized`: sizes, boxes, outlines and JPEGs that cost what COCO's cost.

Blots with lobes, coloured by category. Sources of the figures: the annotation files of COCO 2017; detection challenge
page ("41 % small, 34 % medium, 24 % large"); Singh and Davis 2018 (objects' scales); 160 photos of it (sizes, JPEGs,
outlines).

Images come in shards, each a function of (seed, split, shard) and each picture of (seed, split, index).

N images of a shard, M boxes, C crowds, V corners of an outline. Sizes and boxes in pixels.
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
from detection.synthetic.backgrounds import BACKGROUNDS, CANVAS_PX, GRAIN_HEADROOM, TILE_PX

TRAIN_IMAGES, VAL_IMAGES = 118_287, 5_000
WITHOUT_BOXES = {"train": (1_021, TRAIN_IMAGES), "val": (48, VAL_IMAGES)}  # so many of so many
MOST_BOXES = 93  # of an image of train2017
BOXES_SCALE, BOXES_SHAPE = 6.49, 0.9  # Weibull, rounded up: mean 7.33 as in train2017, 99 % below 36
CROWDS = 10_052 / 117_266  # of the images with boxes

# COCO's categories by supercategory: id, name, boxes in train2017 with crowds (860,001 in all).
CATEGORIES = (
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
THEMES = 5  # categories drawn for an image, with repetition, from which its boxes take theirs: about 3 differ

# The commonest sizes of COCO's photos (width, height, share); the others have one of three longer sides.
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
OTHER_RATIO = (0.55, 0.9)  # of the shorter side to the longer
UPRIGHT = 0.3  # share of the others that are taller than wide

# Side of the square of an object's area: share of the objects below, pixels. 32 and 96 are COCO's small and medium.
AREA_SIDES = ((0.0, 3.0), (0.1, 10.5), (0.25, 19.5), (0.41, 32.0), (0.755, 96.0), (0.9, 190.0), (0.99, 400.0), (1, 520))
LEAST_SIDE_PX = 1.5
CORNERS = 36  # of an outline; smaller ones have a half or a third of them, 21 on average as COCO's polygons have

CROWD_BLOTS = 24
CROWD_BLOT_PX = (8.0, 26.0)

# JPEG quality, share, bits a pixel: the mean, and the spread of its logarithm. Of 160 photos 68 % have the tables of
# quality 96, 30 % of 90, 2 % of 80, all baseline and 4:4:4. Makes 162 KB a picture; train2017.zip has 163.
JPEGS = ((96, 0.68, 5.31), (90, 0.30, 3.02), (80, 0.02, 1.95))
BITS_SPREAD = 0.31
GREY = 0.002  # share of pictures with one channel: a few hundred of COCO's are so

SHARD = 256  # images; changing it changes the pictures

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Category:
    """One of COCO's, with the number of its boxes in train2017."""

    id: int
    name: str
    supercategory: str
    boxes: int


def _parse(line: str) -> list[Category]:
    supercategory, _, rest = line.partition(": ")
    rows = (row.split(" ") for row in rest.split(", "))
    return [Category(int(first), " ".join(name), supercategory, int(last)) for first, *name, last in rows]


COCO = tuple(category for line in CATEGORIES for category in _parse(line))
SHARES = np.array([category.boxes for category in COCO]) / sum(category.boxes for category in COCO)


@dataclass(frozen=True, eq=False)
class Plan:
    """What is in the images of a shard and how they are drawn."""

    seed: int
    split: str
    shard: int
    sizes_wh: Ints
    """(N, 2)."""
    starts: Ints
    """(N + 1,): the boxes of image i are rows starts[i] to starts[i + 1]."""
    labels: Ints
    """(M,) indices of COCO."""
    outlines: Floats
    """(M, V, 2) corners x, y; of every `strides` consecutive ones all are the same."""
    strides: Ints
    """(M,)."""
    areas: Floats
    """(M,) of the outlines."""
    boxes_xywh: Floats
    """(M, 4) of the outlines."""
    colours: Ints
    """(M, 2, 3) RGB of the outside and the inside."""
    crowds: dict[int, list[list[float]]]
    """Outlines x, y, x, y ... of the blots of a crowd, by the row of its box."""
    qualities: Ints
    """(N,) of the JPEG."""
    grain: Ints
    """(N,) level."""
    grey: NDArray[np.bool_]
    """(N,)."""
    background: Ints
    """(N, 5): which, and the left and upper corner of the part of it and of the grain."""


def plan(seed: int, split: str, shard: int) -> Plan:
    """What is in the images of a shard of "train" or "val"."""
    rng = _rng(seed, split, shard, purpose=1)
    sizes_wh = _sizes_wh(seed, split, shard)
    counts = np.minimum(MOST_BOXES, np.ceil(BOXES_SCALE * rng.weibull(BOXES_SHAPE, SHARD))).astype(np.int64)
    counts[[is_empty(split, shard * SHARD + image) for image in range(SHARD)]] = 0
    starts = np.concatenate([[0], np.cumsum(counts)])
    image = np.repeat(np.arange(SHARD), counts)
    num_boxes = len(image)

    themes = rng.choice(len(COCO), size=(SHARD, THEMES), p=SHARES)
    labels = themes[image, rng.integers(THEMES, size=num_boxes)]
    shares, sides = np.array(AREA_SIDES).T
    area_sides = np.exp(np.interp(rng.random(num_boxes), shares, np.log(sides)))
    strides = np.select([area_sides < 20, area_sides < 80], [3, 2], 1)

    shapes = _shapes(rng, labels, strides)
    fill = _areas(shapes)
    # Some categories are tall and some wide, persons tall.
    slant = np.where(labels == 0, -0.6, (labels * 7 % 11 - 5) * 0.1) + rng.normal(0, 0.5, num_boxes)
    extents_wh = np.exp(slant[:, None] * [0.5, -0.5]) * (area_sides / np.sqrt(fill))[:, None]
    extents_wh = extents_wh.clip(LEAST_SIDE_PX, sizes_wh[image])
    corners = rng.random((num_boxes, 2)) * (sizes_wh[image] - extents_wh)
    outlines = np.round(corners[:, None] + shapes * extents_wh[:, None], 2)
    low, high = outlines.min(axis=1), outlines.max(axis=1)

    colours = palette()[labels] + rng.integers(-12, 13, (num_boxes, 2, 3))
    has_crowd = (rng.random(SHARD) < CROWDS) & (counts > 0)
    crowds = {int(starts[i]): _crowd(rng, sizes_wh[i]) for i in np.flatnonzero(has_crowd)}

    quality, share, bits = np.array(JPEGS).T
    kind = rng.choice(len(JPEGS), size=SHARD, p=share)
    bits_px = bits[kind] * np.exp(rng.normal(0, BITS_SPREAD, SHARD) - BITS_SPREAD**2 / 2)
    reach = [BACKGROUNDS, *(CANVAS_PX - sizes_wh.T), *(TILE_PX - sizes_wh.T)]
    return Plan(
        seed=seed,
        split=split,
        shard=shard,
        sizes_wh=sizes_wh,
        starts=starts,
        labels=labels,
        outlines=outlines,
        strides=strides,
        areas=_areas(outlines).round(4),
        boxes_xywh=np.concatenate([low, high - low], axis=1).round(2),
        colours=colours.clip(GRAIN_HEADROOM, 255 - GRAIN_HEADROOM),
        crowds=crowds,
        qualities=quality[kind].astype(np.int64),
        grain=backgrounds.grain_levels(quality[kind], bits_px),
        grey=rng.random(SHARD) < GREY,
        background=np.stack([rng.integers(n, size=SHARD) for n in reach], axis=1),
    )


def _rng(seed: int, split: str, shard: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, {"train": 0, "val": 1}[split], shard, purpose])


def is_empty(split: str, index: int) -> bool:
    """Whether an image is without boxes: evenly spread, the first of them early."""
    some, of = WITHOUT_BOXES[split]
    return (index + 96) * some // of > (index + 95) * some // of


def _image_id(split: str, index: int) -> int:
    return 2 * index + {"train": 1, "val": 2}[split]


def file_name(split: str, index: int) -> str:
    """The name of a picture."""
    return f"{_image_id(split, index):012}.jpg"


def _sizes_wh(seed: int, split: str, shard: int) -> Ints:
    """(N, 2) widths and heights."""
    rng = _rng(seed, split, shard, purpose=0)
    widths, heights, shares = np.array(SIZES).T
    common = rng.choice(len(SIZES) + 1, size=SHARD, p=[*shares, 1 - shares.sum()])
    sides, side_shares = np.array(OTHER_SIDES).T
    longer = rng.choice(sides, size=SHARD, p=side_shares)
    others_wh = np.stack([longer, longer * rng.uniform(*OTHER_RATIO, SHARD)], axis=1)
    others_wh = np.where(rng.random((SHARD, 1)) < UPRIGHT, others_wh[:, ::-1], others_wh)
    sizes_wh = np.stack([[*widths, 0], [*heights, 0]], axis=1)[common]
    return np.where(sizes_wh > 0, sizes_wh, others_wh.round()).astype(np.int64)


def _shapes(rng: np.random.Generator, labels: Ints, strides: Ints) -> Floats:
    """(M, V, 2) outlines in a box of side 1, with as many lobes as the category has."""
    num_boxes = len(labels)
    angles = np.arange(CORNERS) * (2 * math.pi / CORNERS)
    lobes = (2 + labels // 10)[:, None]
    depth, phase = rng.uniform(0, 0.4, (num_boxes, 1)), rng.uniform(0, 2 * math.pi, (num_boxes, 1))
    radii = 1 + depth * np.cos(lobes * angles + phase) + rng.normal(0, 0.04, (num_boxes, CORNERS))
    outlines = radii[..., None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    corners = np.arange(CORNERS) // strides[:, None] * strides[:, None]
    outlines = np.take_along_axis(outlines, corners[..., None], axis=1)
    low = outlines.min(axis=1, keepdims=True)
    return (outlines - low) / (outlines.max(axis=1, keepdims=True) - low)


def _areas(outlines: Floats) -> Floats:
    """(M,) areas of outlines (M, V, 2)."""
    x, y = outlines[..., 0], outlines[..., 1]
    return 0.5 * np.abs((x * np.roll(y, -1, axis=1) - y * np.roll(x, -1, axis=1)).sum(axis=1))


def _crowd(rng: np.random.Generator, size_wh: Ints) -> list[list[float]]:
    """Outlines of blots that stand about in a part of the image."""
    extent_wh = size_wh * rng.uniform([0.2, 0.1], [0.7, 0.4])
    corner = rng.random(2) * (size_wh - extent_wh)
    centres = corner + rng.random((CROWD_BLOTS, 1, 2)) * extent_wh
    radii = rng.uniform(*CROWD_BLOT_PX, (CROWD_BLOTS, 1, 1)) * [0.3, 0.5]
    angles = np.arange(12) * (math.pi / 6)
    outlines = centres + radii * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return [outline.ravel().tolist() for outline in outlines]


@cache
def palette() -> Ints:
    """(80, 2, 3) the colours of each category, outside and inside."""
    label = range(len(COCO))
    pairs = [[toy.rgb(c % 10 / 10, 0.75, 0.95), toy.rgb(c // 10 / 8 + 0.3, 0.75, 0.95)] for c in label]
    return np.array(pairs).round().astype(np.int64)


def image_rows(seed: int, split: str, shard: int) -> list[dict[str, Any]]:
    """The `images` of a shard."""
    rows = []
    for index, (width, height) in enumerate(_sizes_wh(seed, split, shard).tolist(), shard * SHARD):
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


def annotation_rows(plan: Plan, image: int) -> list[dict[str, Any]]:
    """The `annotations` of one image."""
    image_id = _image_id(plan.split, plan.shard * SHARD + image)
    return [
        {
            **(_crowd_row(plan, image, row) if row in plan.crowds else _object_row(plan, row)),
            "image_id": image_id,
            "category_id": COCO[plan.labels[row]].id,
            "id": 100 * image_id + place,
        }
        for place, row in enumerate(range(plan.starts[image], plan.starts[image + 1]))
    ]


def _object_row(plan: Plan, row: int) -> dict[str, Any]:
    return {
        "segmentation": [plan.outlines[row, :: plan.strides[row]].ravel().tolist()],
        "area": float(plan.areas[row]),
        "iscrowd": 0,
        "bbox": plan.boxes_xywh[row].tolist(),
    }


def _crowd_row(plan: Plan, image: int, row: int) -> dict[str, Any]:
    width, height = plan.sizes_wh[image].tolist()
    stencil = Image.new("L", (width, height))
    pen = ImageDraw.Draw(stencil)
    for blot in plan.crowds[row]:
        pen.polygon(blot, fill=1)
    mask = np.asarray(stencil) > 0
    box = stencil.getbbox()
    assert box is not None, "the middle of every blot is in the image"
    left, top, right, bottom = box
    return {
        "segmentation": {"counts": toy.run_lengths(mask), "size": [height, width]},
        "area": int(mask.sum()),
        "iscrowd": 1,
        "bbox": [left, top, right - left, bottom - top],
    }


def picture(plan: Plan, image: int) -> bytes:
    """The JPEG of one image."""
    seed, (width, height) = plan.seed, plan.sizes_wh[image].tolist()
    background, left, top, grain_left, grain_top = plan.background[image].tolist()
    canvas = backgrounds.backgrounds(seed)[background].crop((left, top, left + width, top + height))
    pen = ImageDraw.Draw(canvas)
    rows = range(plan.starts[image], plan.starts[image + 1])
    for row in sorted(rows, key=lambda row: -plan.areas[row]):  # so that small ones lie on large ones
        outside, inside = (tuple(colour) for colour in plan.colours[row].tolist())
        if row in plan.crowds:
            for blot in plan.crowds[row]:
                pen.polygon(blot, fill=outside)
            continue
        outline = plan.outlines[row, :: plan.strides[row]]
        pen.polygon(outline.ravel().tolist(), fill=outside)
        centre = plan.boxes_xywh[row, :2] + plan.boxes_xywh[row, 2:] / 2
        pen.polygon(((outline + centre) / 2).ravel().tolist(), fill=inside)
    grain = backgrounds.grain(seed, int(plan.grain[image]))
    shifted = grain.crop((grain_left, grain_top, grain_left + width, grain_top + height))
    canvas = ImageChops.add_modulo(canvas, shifted)
    if plan.grey[image]:
        canvas = canvas.convert("L")
    encoded = io.BytesIO()
    canvas.save(encoded, "JPEG", quality=int(plan.qualities[image]), subsampling=0)
    return encoded.getvalue()
