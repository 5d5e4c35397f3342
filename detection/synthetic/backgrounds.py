"""The ground that `detection.synthetic.coco_scenes` draws on, and the grain that makes its JPEGs as large as wanted.

N images.
"""

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

GRAIN_HEADROOM = 48  # grain is within this of 0, colours keep this from 0 and 255: a sum that wraps never does
GRAIN_LEAST, GRAIN_STEP = 0.5, 1.15  # standard deviation of the first level, and from each to the next
# Bits a pixel of pictures drawn here with grain of these standard deviations, for each quality. Measured, n = 16.
GRAIN_SIGMAS = (0.5, 0.87, 1.33, 2.02, 3.08, 4.68, 7.12, 10.82, 12.45, 16.46)
GRAIN_BITS = {
    96: (1.87, 2.18, 2.61, 3.21, 3.93, 5.02, 6.80, 8.63, 9.27, 10.5),
    90: (0.90, 1.02, 1.20, 1.45, 1.88, 2.53, 3.30, 4.28, 4.75, 6.05),
    80: (0.59, 0.60, 0.66, 0.80, 1.02, 1.33, 1.86, 2.60, 2.85, 3.41),
}

TILE_PX = 704  # of grain: the longest side of a picture, and 64 to shift it
CANVAS_PX = 1024  # of a background
BACKGROUNDS = 12

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@cache
def backgrounds(seed: int) -> list[Image.Image]:
    """Muted colours that run into each other, with edges of things that are none of the categories."""
    rng = np.random.default_rng([seed, 2])
    backgrounds = []
    for _ in range(BACKGROUNDS):
        colours = rng.integers(80, 176, (4, 4, 1)) + rng.integers(-25, 26, (4, 4, 3))
        canvas = Image.fromarray(colours.clip(GRAIN_HEADROOM, 255 - GRAIN_HEADROOM).astype(np.uint8))
        canvas = canvas.resize((CANVAS_PX, CANVAS_PX), Image.Resampling.BILINEAR)  # keeps within the colours
        pen = ImageDraw.Draw(canvas)
        for _ in range(40):
            corners = rng.uniform(-50, CANVAS_PX, (1, 2)) + rng.uniform(0, 160, (4, 2))
            colour = rng.integers(90, 166) + rng.integers(-15, 16, 3)
            pen.polygon(corners.ravel().tolist(), fill=tuple(colour.tolist()))
        backgrounds.append(canvas)
    return backgrounds


@cache
def grain(seed: int, level: int) -> Image.Image:
    """Noise in brightness and half as much in colour, around 0 modulo 256."""
    rng = np.random.default_rng([seed, 3])
    noise = rng.standard_normal((TILE_PX, TILE_PX, 1), dtype=np.float32)
    noise = noise + 0.5 * rng.standard_normal((TILE_PX, TILE_PX, 3), dtype=np.float32)
    noise *= GRAIN_LEAST * GRAIN_STEP**level
    return Image.fromarray(noise.round().clip(-GRAIN_HEADROOM, GRAIN_HEADROOM).astype(np.int8).view(np.uint8))


def grain_levels(qualities: Floats, bits_px: Floats) -> Ints:
    """(N,) the grain with which a JPEG of this quality takes so many bits a pixel."""
    levels = np.zeros(len(bits_px), dtype=np.int64)
    for quality, table in GRAIN_BITS.items():
        of_it = qualities == quality
        sigmas = np.exp(np.interp(bits_px[of_it], table, np.log(GRAIN_SIGMAS)))
        levels[of_it] = np.rint(np.log(sigmas / GRAIN_LEAST) / math.log(GRAIN_STEP))
    return levels
