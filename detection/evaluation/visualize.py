"""Boxes, names, scores and masks drawn on images, legible on any background."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from detection.data import rle
from detection.data.rle import CocoRle
from detection.evaluation.fonts import split_by_font

# Limits of the longer side of the output: text needs room, and viewers have a maximum.
MIN_SIDE_PX = 300
MAX_SIDE_PX = 4096
# Text height and line width as fractions of the shorter side.
TEXT_FRACTION = 1 / 28
LINE_FRACTION = 1 / 200
MIN_TEXT_PX = 11
MASK_ALPHA = 0.5  # a lower value is lost on a background of the same color, a higher one hides the object
PADDING_PX = 2
GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Annotation:
    """Box in pixels of the image, its text, and its mask if there is one.

    label: from 1, determines the color. mask: of the whole image, at any scale.
    """

    box_xyxy: tuple[float, float, float, float]
    label: int
    text: str
    mask: CocoRle | None = None


def draw_annotations(image: Image.Image, annotations: Sequence[Annotation]) -> Image.Image:
    """Return a copy of an RGB image with its annotations, the first on top. Scale extreme sizes."""
    scale = display_scale(*image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
    canvas = image.resize(size, resample, reducing_gap=2.0)
    for annotation in reversed(annotations):  # before all boxes, so that no mask covers a line
        if annotation.mask is not None:
            overlay_mask(canvas, annotation.mask, label_color(annotation.label))
    pen = ImageDraw.Draw(canvas)
    width = max(2, round(min(size) * LINE_FRACTION))
    text_px = max(MIN_TEXT_PX, round(min(size) * TEXT_FRACTION))
    for annotation in reversed(annotations):
        left, top, right, bottom = (scale * side for side in annotation.box_xyxy)
        pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline="black", width=width + 2)
        pen.rectangle((left, top, right, bottom), outline=label_color(annotation.label), width=width)
    for annotation in reversed(annotations):  # after all boxes, so that no line crosses a text
        draw_label(pen, canvas.size, [scale * side for side in annotation.box_xyxy], annotation, text_px)
    return canvas


def overlay_mask(canvas: Image.Image, mask: CocoRle, color: tuple[int, int, int]) -> None:
    """Blend a color into the pixels of a mask.

    The mask is decoded here, since all masks of a huge image take gigabytes.
    """
    alpha = Image.fromarray(rle.decode_mask(mask) * np.uint8(round(255 * MASK_ALPHA)))
    canvas.paste(color, (0, 0), alpha.resize(canvas.size, Image.Resampling.BILINEAR, reducing_gap=2.0))


def display_scale(width_px: int, height_px: int) -> float:
    """Return the scale that brings an image within the limits of the output."""
    longer = max(width_px, height_px)
    return min(max(1.0, MIN_SIDE_PX / longer), MAX_SIDE_PX / longer)


def draw_label(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    box_xyxy: Sequence[float],
    annotation: Annotation,
    text_px: int,
) -> None:
    """Draw the text, black on the color of its label, above the box or inside its upper edge if there is no room."""
    parts, end = [], 0.0  # on one baseline at y = 0
    for text, font in split_by_font(annotation.text, text_px):
        parts.append((end, text, font, pen.textbbox((end, 0), text, font=font, anchor="ls")))
        end += font.getlength(text)
    lefts, tops, rights, bottoms = zip(*(bounds for *_, bounds in parts), strict=True)
    left, top = min(lefts), min(tops)
    width, height = max(rights) - left + 2 * PADDING_PX, max(bottoms) - top + 2 * PADDING_PX
    x = max(0, min(box_xyxy[0], size[0] - width))
    y = box_xyxy[1] - height if box_xyxy[1] >= height else box_xyxy[1]
    y = max(0, min(y, size[1] - height))
    pen.rectangle((x - 1, y - 1, x + width + 1, y + height + 1), fill="black")
    pen.rectangle((x, y, x + width, y + height), fill=label_color(annotation.label))
    for start, text, font, _ in parts:
        pen.text((x + PADDING_PX - left + start, y + PADDING_PX - top), text, fill="black", font=font, anchor="ls")


def label_color(label: int) -> tuple[int, int, int]:
    """Return the color of a label. Black text is legible on it, and neighboring labels have distant hues."""
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(label * GOLDEN_RATIO % 1, 0.6, 1.0))
    return red, green, blue
