"""Backgrounds of `detection.synthetic.coco_scenes`, and the noise that gives its JPEGs the size of COCO's.

N images.
"""

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

# Largest absolute noise. Colors stay this far from 0 and 255, so the sum modulo 256 never wraps.
NOISE_HEADROOM = 48
NOISE_MIN_SIGMA, NOISE_SIGMA_RATIO = 0.5, 1.15  # standard deviation of level 0, and its ratio from level to level
# Bits per pixel of these images with noise of these standard deviations, by JPEG quality. Measured, n = 16.
MEASURED_SIGMAS = (0.5, 0.87, 1.33, 2.02, 3.08, 4.68, 7.12, 10.82, 12.45, 16.46)
MEASURED_BITS_PX = {
    96: (1.87, 2.18, 2.61, 3.21, 3.93, 5.02, 6.80, 8.63, 9.27, 10.5),
    90: (0.90, 1.02, 1.20, 1.45, 1.88, 2.53, 3.30, 4.28, 4.75, 6.05),
    80: (0.59, 0.60, 0.66, 0.80, 1.02, 1.33, 1.86, 2.60, 2.85, 3.41),
}

TILE_PX = 704  # side of the noise tile: the longest image side, and 64 for a random offset
CANVAS_PX = 1024  # side of a background
NUM_BACKGROUNDS = 12

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@cache
def make_backgrounds(seed: int) -> list[Image.Image]:
    """Return canvases of blended muted colors, with quadrilaterals that belong to no category."""
    rng = np.random.default_rng([seed, 2])
    canvases = []
    for _ in range(NUM_BACKGROUNDS):
        colors = rng.integers(80, 176, (4, 4, 1)) + rng.integers(-25, 26, (4, 4, 3))
        canvas = Image.fromarray(colors.clip(NOISE_HEADROOM, 255 - NOISE_HEADROOM).astype(np.uint8))
        # Bilinear interpolation stays within the range of the colors.
        canvas = canvas.resize((CANVAS_PX, CANVAS_PX), Image.Resampling.BILINEAR)
        pen = ImageDraw.Draw(canvas)
        for _ in range(40):
            corners = rng.uniform(-50, CANVAS_PX, (1, 2)) + rng.uniform(0, 160, (4, 2))
            color = rng.integers(90, 166) + rng.integers(-15, 16, 3)
            pen.polygon(corners.ravel().tolist(), fill=tuple(color.tolist()))
        canvases.append(canvas)
    return canvases


@cache
def make_noise(seed: int, level: int) -> Image.Image:
    """Return a noise tile modulo 256: luma noise, and color noise with half its standard deviation."""
    rng = np.random.default_rng([seed, 3])
    noise = rng.standard_normal((TILE_PX, TILE_PX, 1), dtype=np.float32)
    noise = noise + 0.5 * rng.standard_normal((TILE_PX, TILE_PX, 3), dtype=np.float32)
    noise *= NOISE_MIN_SIGMA * NOISE_SIGMA_RATIO**level
    return Image.fromarray(noise.round().clip(-NOISE_HEADROOM, NOISE_HEADROOM).astype(np.int8).view(np.uint8))


def pick_noise_levels(qualities: Floats, bits_px: Floats) -> Ints:
    """Return the noise levels (N,) at which JPEGs of these qualities take `bits_px` bits per pixel."""
    levels = np.zeros(len(bits_px), dtype=np.int64)
    for quality, table in MEASURED_BITS_PX.items():
        has_quality = qualities == quality
        sigmas = np.exp(np.interp(bits_px[has_quality], table, np.log(MEASURED_SIGMAS)))
        levels[has_quality] = np.rint(np.log(sigmas / NOISE_MIN_SIGMA) / math.log(NOISE_SIGMA_RATIO))
    return levels
