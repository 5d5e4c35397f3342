"""Augmentation: the random IoU crop, flip, resize to 300x300, colour jitter, normalisation.

What is random is drawn per image on the CPU from (seed, epoch, image id) and handed on as parameters. The crop
happens where the image is decoded; flip, jitter and normalisation work on whole batches on the device.

B images, G boxes of one image.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detection.runtime.device import constant

Floats = NDArray[np.float32]

# Minimum overlap of each option of the crop (SSD paper, section 2.2): None keeps the whole image, 0 is "any".
CROP_OPTIONS = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)
MIN_CROP_SIDE = 0.3
MAX_CROP_ASPECT = 2.0
# Tries drawn at once. One is accepted so rarely that drawing one after another costs four times as much.
CROP_TRIES = 32
WHOLE_IMAGE = np.array([0, 0, 1, 1], dtype=np.float32)

# Half-widths of the ranges that jitter factors are drawn from, and the operations they belong to.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
JITTER_RANGES = (0.125, 0.5, 0.5, 0.05)
NO_JITTER = np.array([1, 1, 1, 0], dtype=np.float32)
GREY_WEIGHTS = (0.2989, 0.587, 0.114)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Draw:
    """All that is random about one image in one epoch.

    crop_xyxy: (4,) normalised. flips: (2,) mirror left to right, top to bottom. jitter: (4,) factors of
    brightness, contrast and saturation (1 changes nothing) and shift of hue in turns (0 changes nothing).
    jitter_order: (4,) operations.
    """

    crop_xyxy: Floats
    flips: NDArray[np.bool_]
    jitter: Floats
    jitter_order: NDArray[np.int64]


def draw(rng: np.random.Generator, boxes_xyxy: Floats, max_samples: int) -> Draw:
    """Draw the augmentation of an image with boxes (G, 4), normalised; `max_samples` tries a crop option."""
    crop = draw_crop(rng, boxes_xyxy, max_samples)
    ranges = np.array(JITTER_RANGES)
    factors = NO_JITTER + rng.uniform(-ranges, ranges)
    return Draw(crop, rng.random(2) < 0.5, factors.astype(np.float32), rng.permutation(4))


def draw_crop(rng: np.random.Generator, boxes_xyxy: Floats, max_samples: int) -> Floats:
    """Draw the random IoU crop (4,) xyxy for boxes (G, 4), all normalised.

    The law is the reference's: draw an option; keep the whole image, or try up to `max_samples` rectangles with
    sides in [0.3, 1] and aspect in [1/2, 2] until the IoU of every box with it exceeds the option's minimum and
    at least one box has its centre inside; when the tries run out, draw the option again. Rounds are
    independent, so many are drawn at once and the first accepted one wins.
    """
    minima = np.array([np.nan if option is None else option or -1 for option in CROP_OPTIONS])
    rounds = max(4, CROP_TRIES // max_samples)
    while True:
        minimum = minima[rng.integers(0, len(minima), rounds)]
        sides = rng.uniform(MIN_CROP_SIDE, 1, (rounds, max_samples, 2)).astype(np.float32)
        corners = rng.uniform(0, 1, sides.shape).astype(np.float32) * (1 - sides)
        crops = np.concatenate([corners, corners + sides], axis=-1)
        aspect = sides[..., 0] / sides[..., 1]
        accepted = (
            (aspect >= 1 / MAX_CROP_ASPECT)
            & (aspect <= MAX_CROP_ASPECT)
            & np.all(iou_with(crops, boxes_xyxy) > minimum[:, None, None], axis=-1)
            & np.any(centres_inside(crops, boxes_xyxy), axis=-1)
        )
        whole = np.isnan(minimum)
        for i in np.flatnonzero(whole | accepted.any(axis=1))[:1]:
            return WHOLE_IMAGE if whole[i] else crops[i, accepted[i].argmax()]


def iou_with(crops_xyxy: Floats, boxes_xyxy: Floats) -> Floats:
    """IoU (..., G) of crops (..., 4) with boxes (G, 4)."""
    # Side by side: to reduce an axis of two takes three times as long as to name its elements.
    left, top, right, bottom = (crops_xyxy[..., side, None] for side in range(4))
    box_left, box_top, box_right, box_bottom = boxes_xyxy.T
    width = np.maximum(np.minimum(right, box_right) - np.maximum(left, box_left), 0)
    height = np.maximum(np.minimum(bottom, box_bottom) - np.maximum(top, box_top), 0)
    intersection = width * height
    crop_area = (right - left) * (bottom - top)
    box_area = (box_right - box_left) * (box_bottom - box_top)
    return np.asarray(intersection / (crop_area + box_area - intersection))


def centres_inside(crops_xyxy: Floats, boxes_xyxy: Floats) -> NDArray[np.bool_]:
    """Which boxes (G, 4) have their centre strictly inside each crop (..., 4): (..., G)."""
    left, top, right, bottom = (crops_xyxy[..., side, None] for side in range(4))
    x, y = ((boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2).T
    return np.asarray((x > left) & (x < right) & (y > top) & (y < bottom))


def crop_boxes(crop_xyxy: Floats, boxes_xyxy: Floats, labels: NDArray[np.int64]) -> tuple[Floats, NDArray[np.int64]]:
    """Boxes (G', 4) and labels (G',) whose centre lies in the crop, clipped to it and relative to it."""
    if crop_xyxy is WHOLE_IMAGE:
        return boxes_xyxy, labels
    kept = centres_inside(crop_xyxy, boxes_xyxy)
    origin, side = np.tile(crop_xyxy[:2], 2), np.tile(crop_xyxy[2:] - crop_xyxy[:2], 2)
    return ((boxes_xyxy[kept] - origin) / side).clip(0, 1), labels[kept]


def flip(images: Tensor, boxes_xyxy: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror images (B, 3, H, W) and boxes (B, G, 4), normalised, where flips (B, 0 to 2) say so.

    Its columns are the directions in use: left to right, then top to bottom. One that is not costs nothing.
    """
    for axis, flipped in enumerate(flips.unbind(1)):
        images = torch.where(flipped[:, None, None, None], images.flip(-1 - axis), images)
        mirrored = boxes_xyxy.clone()
        mirrored[..., axis] = 1 - boxes_xyxy[..., axis + 2]
        mirrored[..., axis + 2] = 1 - boxes_xyxy[..., axis]
        boxes_xyxy = torch.where(flipped[:, None, None], mirrored, boxes_xyxy)
    return images, boxes_xyxy


def jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of float images (B, 3, H, W) in [0, 1].

    images may be changed in place. factors: (B, 4); order: (B, 4). Each image has its own factors and order; the
    arithmetic is that of torchvision's ColorJitter.
    """
    if images.device.type == "cpu" and not torch.compiler.is_compiling():
        # Each image by itself, since it stays in the core's cache and nothing is computed that is not asked for. An
        # accelerator would wait for each, and compiled code reads and writes once a round whatever it computes.
        for image, image_factors, operations in zip(images, factors.tolist(), order.tolist(), strict=True):
            planar = image.contiguous()
            for operation in operations:
                jitter_one(planar, operation, image_factors[operation])
            image.copy_(planar)
        return images
    for operations in order.unbind(1):
        images = blend(images, factors, operations)
        shifted = (operations == HUE)[:, None, None, None]
        images = torch.where(shifted, shift_hue(images, factors[:, HUE]), images)
    return images


def jitter_one(image: Tensor, operation: int, factor: float) -> None:
    """Apply one operation to an image (3, H, W) in [0, 1], in place; one that changes nothing costs nothing."""
    if factor == NO_JITTER[operation]:
        return
    if operation == HUE:
        image.copy_(shift_hue(image.unsqueeze(0), image.new_tensor([factor]))[0])
        return
    if operation == BRIGHTNESS:
        image.mul_(factor)
    else:
        grey = torch.tensordot(image.new_tensor(GREY_WEIGHTS), image, dims=1)
        image.mul_(factor).add_(grey.mean() if operation == CONTRAST else grey, alpha=1 - factor)
    image.clamp_(0, 1)


def blend(images: Tensor, factors: Tensor, operations: Tensor) -> Tensor:
    """Mix each image with black (brightness), its mean grey (contrast) or its greys (saturation).

    operations: (B,); an image whose operation is HUE stays as it is.
    """
    red, green, blue = images.unbind(1)
    grey = (GREY_WEIGHTS[0] * red + GREY_WEIGHTS[1] * green + GREY_WEIGHTS[2] * blue).unsqueeze(1)
    factor = factors.gather(1, operations[:, None])[:, :, None, None]
    operation = operations[:, None, None, None]
    other = torch.where(operation == SATURATION, grey, grey.mean(dim=(2, 3), keepdim=True))
    other = torch.where(operation == BRIGHTNESS, 0, other)
    return torch.where(operation == HUE, images, torch.lerp(other, images, factor).clamp_(0, 1))


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Rotate the hue of RGB images (B, 3, H, W) in [0, 1] by turns (B,), in the HSV hexcone.

    With hue h in sixths, channel n of the result is v - c·clamp(min(k, 4 - k), 0, 1), k = (n + h) mod 6,
    n = 5, 3, 1 for red, green and blue: the closed form of the six cases.
    """
    # Masks that are multiplied and a floor: where, max with its index and % take several times as long on a CPU.
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    is_red = (value == red).to(images.dtype)
    is_green = (value == green).to(images.dtype) * (1 - is_red)
    is_blue = 1 - is_red - is_green
    sixths = is_red * (green - blue) + is_green * (blue - red) + is_blue * (red - green)
    sixths = sixths / chroma.clamp(min=1e-12) + 2 * is_green + 4 * is_blue + 6 * turns[:, None, None]
    channels = []
    for n in (5, 3, 1):
        k = sixths + n
        k = k - 6 * torch.floor(k / 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, dim=1)


def to_unit(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1], keeping their memory format."""
    return images.to(torch.float32).div_(255)


def normalise(images: Tensor) -> Tensor:
    """Subtract ImageNet's mean and divide by its standard deviation: float (B, 3, H, W) in [0, 1]."""
    mean, std = (constant(values, images.device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std
