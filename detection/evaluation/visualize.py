"""Detections drawn on pictures: boxes, names and scores that can be read on any ground, and masks to look through."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from detection.data import rle
from detection.data.rle import CompressedMask

# What the longer side of a drawn picture is at least and at most: text needs room, and a viewer has an end.
LEAST_SIDE_PX = 300
MOST_SIDE_PX = 4096
# Of the shorter side: text is this high, and lines this wide.
TEXT_SHARE = 1 / 28
LINE_SHARE = 1 / 200
LEAST_TEXT_PX = 11
MASK_ALPHA = 0.5  # less is lost on a ground of the same colour, more hides what is under it
PADDING_PX = 2
GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Mark:
    """What is drawn: a box, left, top, right, bottom in pixels of the picture, and what stands above it.

    label: from 1, chooses the colour. mask: of the whole picture, if it has one; at any scale.
    """

    box_xyxy: tuple[float, float, float, float]
    label: int
    text: str
    mask: CompressedMask | None = None


def draw(image: Image.Image, marks: Sequence[Mark]) -> Image.Image:
    """A copy of an RGB picture with its marks, the first on top; a small picture is enlarged, a huge one shrunk."""
    scale = scale_of(*image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
    drawn = image.resize(size, resample, reducing_gap=2.0)
    for mark in reversed(marks):  # before all boxes, so that no line is tinted
        if mark.mask is not None:
            tint(drawn, mark.mask, colour(mark.label))
    pen = ImageDraw.Draw(drawn)
    width = max(2, round(min(size) * LINE_SHARE))
    font = ImageFont.load_default(size=max(LEAST_TEXT_PX, round(min(size) * TEXT_SHARE)))
    for mark in reversed(marks):
        left, top, right, bottom = (scale * side for side in mark.box_xyxy)
        pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline="black", width=width + 2)
        pen.rectangle((left, top, right, bottom), outline=colour(mark.label), width=width)
    for mark in reversed(marks):  # after all boxes, so that no line crosses a text
        write(pen, drawn.size, [scale * side for side in mark.box_xyxy], mark, font)
    return drawn


def tint(drawn: Image.Image, mask: CompressedMask, colour: tuple[int, int, int]) -> None:
    """Lay a colour over what is in the mask; decoded here, since all masks of a huge picture at once take gigabytes."""
    share = Image.fromarray(rle.bitmap(mask) * np.uint8(round(255 * MASK_ALPHA)))
    drawn.paste(colour, (0, 0), share.resize(drawn.size, Image.Resampling.BILINEAR, reducing_gap=2.0))


def scale_of(width_px: int, height_px: int) -> float:
    """What a picture is enlarged or shrunk by to be drawn on."""
    longer = max(width_px, height_px)
    return min(max(1.0, LEAST_SIDE_PX / longer), MOST_SIDE_PX / longer)


def write(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    box_xyxy: Sequence[float],
    mark: Mark,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Write a mark's text, black on its colour, above its box or, where no room is left, inside its upper edge."""
    left, top, right, bottom = pen.textbbox((0, 0), mark.text, font=font)
    width, height = right - left + 2 * PADDING_PX, bottom - top + 2 * PADDING_PX
    x = max(0, min(box_xyxy[0], size[0] - width))
    y = box_xyxy[1] - height if box_xyxy[1] >= height else box_xyxy[1]
    y = max(0, min(y, size[1] - height))
    pen.rectangle((x - 1, y - 1, x + width + 1, y + height + 1), fill="black")
    pen.rectangle((x, y, x + width, y + height), fill=colour(mark.label))
    pen.text((x + PADDING_PX - left, y + PADDING_PX - top), mark.text, fill="black", font=font)


def colour(label: int) -> tuple[int, int, int]:
    """The colour of a label: bright, so that black can be read on it; labels side by side have hues far apart."""
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(label * GOLDEN_RATIO % 1, 0.6, 1.0))
    return red, green, blue
