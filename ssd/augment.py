"""Augmentation of training images: random IoU crop, flip, color jitter, normalization.

All random parameters of an image are sampled on the CPU, as a function of (seed, epoch, image id). Neither the number
of workers and ranks nor the device changes them. The crop is applied where the image is decoded. Flip, jitter and
normalization work on whole batches on the device.

A new augmentation is a field of `AugmentParams`, a sample in `sample_augmentation` and an operation in `augment_batch`.
Its setting is a field of ssd/config.py.

Shapes: B images, G boxes of one image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detection.runtime.device import device_constant
from ssd.config import Config

FloatArray = NDArray[np.float32]

# Minimum IoU of each crop option (SSD paper, section 2.2). None keeps the whole image, 0 accepts any IoU.
CROP_OPTIONS = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)
MIN_CROP_SIDE = 0.3
MAX_CROP_ASPECT = 2.0
# Crops sampled at once. Few are accepted, so sampling them one by one costs four times as much.
CROP_TRIES = 32
WHOLE_IMAGE = np.array([0, 0, 1, 1], dtype=np.float32)

# Directions in which images may be flipped, by setting: horizontal, then vertical.
FLIP_DIRECTIONS = {"none": 0, "horizontal": 1, "horizontal+vertical": 2}

# The four jitter operations, and the half-widths of the ranges of their factors.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
JITTER_RANGES = (0.125, 0.5, 0.5, 0.05)
IDENTITY_JITTER = np.array([1, 1, 1, 0], dtype=np.float32)
LUMA_WEIGHTS = (0.2989, 0.587, 0.114)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class AugmentParams(NamedTuple):
    """Random parameters of one image in one epoch, or of a batch, whose tensors have one more dimension, B.

    flips: (0 to 2,) bool, one per direction in use. jitter: (4,) factors of brightness, contrast and saturation
    (identity: 1) and the hue shift in turns (identity: 0). jitter_order: (4,) operations.
    """

    flips: Tensor
    jitter: Tensor
    jitter_order: Tensor

    @classmethod
    def stack(cls, images: "Sequence[AugmentParams]") -> "AugmentParams":
        """Return the parameters of a batch of these images."""
        return cls(*map(torch.stack, zip(*images, strict=True)))


def sample_augmentation(
    config: Config, rng: np.random.Generator, boxes_xyxy: FloatArray
) -> tuple[FloatArray, AugmentParams]:
    """Sample the crop (4,) xyxy and the other parameters of an image with boxes (G, 4), all normalized.

    Every number is drawn whether or not the settings use it, so that a setting does not change the others' numbers.
    """
    crop = sample_iou_crop(rng, boxes_xyxy, config.max_samples)
    ranges = np.array(JITTER_RANGES)
    jitter = (IDENTITY_JITTER + rng.uniform(-ranges, ranges)).astype(np.float32)
    flips = rng.random(2) < 0.5
    params = AugmentParams(
        torch.from_numpy(flips[: FLIP_DIRECTIONS[config.flip]]),
        torch.from_numpy(jitter if config.jitter else IDENTITY_JITTER),
        torch.from_numpy(rng.permutation(4)),
    )
    return crop if config.crop else WHOLE_IMAGE, params


def augment_batch(images: Tensor, boxes_xyxy: Tensor, params: AugmentParams) -> tuple[Tensor, Tensor]:
    """Augment cropped uint8 images (B, 3, H, W), which become floats in [0, 1], and normalized boxes (B, G, 4)."""
    images, boxes_xyxy = flip(images, boxes_xyxy, params.flips)  # in uint8: a quarter of the memory traffic
    return color_jitter(to_float(images), params.jitter, params.jitter_order), boxes_xyxy


def sample_iou_crop(rng: np.random.Generator, boxes_xyxy: FloatArray, max_samples: int) -> FloatArray:
    """Sample the random IoU crop (4,) xyxy for boxes (G, 4), all normalized.

    The distribution is the reference's. Each round chooses an option: either the whole image or a minimum IoU. A
    minimum IoU allows up to `max_samples` rectangles with sides in [0.3, 1] and aspect in [1/2, 2]. The first one
    whose IoU with every box exceeds the minimum, and that contains a box center, is the crop. Without one, the next
    round begins. Rounds are independent, so many are sampled at once and the first success wins.
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
            & np.all(crop_box_iou(crops, boxes_xyxy) > minimum[:, None, None], axis=-1)
            & np.any(centers_inside(crops, boxes_xyxy), axis=-1)
        )
        is_whole = np.isnan(minimum)
        for i in np.flatnonzero(is_whole | accepted.any(axis=1))[:1]:
            return WHOLE_IMAGE if is_whole[i] else crops[i, accepted[i].argmax()]


def crop_box_iou(crops_xyxy: FloatArray, boxes_xyxy: FloatArray) -> FloatArray:
    """Return the IoU (..., G) of crops (..., 4) with boxes (G, 4)."""
    # Separate coordinates: a reduction over an axis of two takes three times as long.
    left, top, right, bottom = (crops_xyxy[..., side, None] for side in range(4))
    box_left, box_top, box_right, box_bottom = boxes_xyxy.T
    width = np.maximum(np.minimum(right, box_right) - np.maximum(left, box_left), 0)
    height = np.maximum(np.minimum(bottom, box_bottom) - np.maximum(top, box_top), 0)
    intersection = width * height
    crop_area = (right - left) * (bottom - top)
    box_area = (box_right - box_left) * (box_bottom - box_top)
    return np.asarray(intersection / (crop_area + box_area - intersection))


def centers_inside(crops_xyxy: FloatArray, boxes_xyxy: FloatArray) -> NDArray[np.bool_]:
    """Test if the center of each box (G, 4) lies strictly inside each crop (..., 4): (..., G) bool."""
    left, top, right, bottom = (crops_xyxy[..., side, None] for side in range(4))
    x, y = ((boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2).T
    return np.asarray((x > left) & (x < right) & (y > top) & (y < bottom))


def crop_boxes(
    crop_xyxy: FloatArray, boxes_xyxy: FloatArray, labels: NDArray[np.int64]
) -> tuple[FloatArray, NDArray[np.int64]]:
    """Return the boxes (G', 4) with their center in the crop, clipped and relative to it, and their labels (G',)."""
    if crop_xyxy is WHOLE_IMAGE:
        return boxes_xyxy, labels
    keep = centers_inside(crop_xyxy, boxes_xyxy)
    origin, side = np.tile(crop_xyxy[:2], 2), np.tile(crop_xyxy[2:] - crop_xyxy[:2], 2)
    return ((boxes_xyxy[keep] - origin) / side).clip(0, 1), labels[keep]


def flip(images: Tensor, boxes_xyxy: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
    """Flip images (B, 3, H, W) and normalized boxes (B, G, 4) as `flips` (B, 0 to 2) asks.

    The columns of `flips` are the directions in use: horizontal, then vertical. Directions not in use cost nothing.
    """
    for axis, is_flipped in enumerate(flips.unbind(1)):
        images = torch.where(is_flipped[:, None, None, None], images.flip(-1 - axis), images)
        flipped_boxes = boxes_xyxy.clone()
        flipped_boxes[..., axis] = 1 - boxes_xyxy[..., axis + 2]
        flipped_boxes[..., axis + 2] = 1 - boxes_xyxy[..., axis]
        boxes_xyxy = torch.where(is_flipped[:, None, None], flipped_boxes, boxes_xyxy)
    return images, boxes_xyxy


def color_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of float images (B, 3, H, W) in [0, 1], possibly in place.

    factors: (B, 4). order: (B, 4). Each image has its own factors and order. The arithmetic is that of torchvision's
    ColorJitter.
    """
    if images.device.type == "cpu" and not torch.compiler.is_compiling():
        # Image by image: the image stays in the core's cache, and identity operations are skipped. An accelerator
        # would synchronize once per image. Compiled code reads and writes each image once per round in any case.
        for image, image_factors, operations in zip(images, factors.tolist(), order.tolist(), strict=True):
            planar = image.contiguous()
            for operation in operations:
                color_jitter_image(planar, operation, image_factors[operation])
            image.copy_(planar)
        return images
    for operations in order.unbind(1):
        images = blend(images, factors, operations)
        is_hue = (operations == HUE)[:, None, None, None]
        images = torch.where(is_hue, shift_hue(images, factors[:, HUE]), images)
    return images


def color_jitter_image(image: Tensor, operation: int, factor: float) -> None:
    """Apply one operation to an image (3, H, W) in [0, 1], in place. Skip the identity."""
    if factor == IDENTITY_JITTER[operation]:
        return
    if operation == HUE:
        image.copy_(shift_hue(image.unsqueeze(0), image.new_tensor([factor]))[0])
        return
    if operation == BRIGHTNESS:
        image.mul_(factor)
    else:
        luma = torch.tensordot(image.new_tensor(LUMA_WEIGHTS), image, dims=1)
        image.mul_(factor).add_(luma.mean() if operation == CONTRAST else luma, alpha=1 - factor)
    image.clamp_(0, 1)


def blend(images: Tensor, factors: Tensor, operations: Tensor) -> Tensor:
    """Blend each image with black (brightness), its mean luma (contrast) or its luma (saturation).

    operations: (B,). Images whose operation is HUE do not change.
    """
    red, green, blue = images.unbind(1)
    luma = (LUMA_WEIGHTS[0] * red + LUMA_WEIGHTS[1] * green + LUMA_WEIGHTS[2] * blue).unsqueeze(1)
    factor = factors.gather(1, operations[:, None])[:, :, None, None]
    operation = operations[:, None, None, None]
    other = torch.where(operation == SATURATION, luma, luma.mean(dim=(2, 3), keepdim=True))
    other = torch.where(operation == BRIGHTNESS, 0, other)
    return torch.where(operation == HUE, images, torch.lerp(other, images, factor).clamp_(0, 1))


def shift_hue(images: Tensor, hue_shift: Tensor) -> Tensor:
    """Rotate the hue of RGB images (B, 3, H, W) in [0, 1] by hue_shift (B,) turns, in the HSV hexcone.

    The result has the memory format of the images. This is the closed form of the six cases. With hue h in sixths,
    value v and chroma c, a channel of the result is v - c·clamp(min(k, 4 - k), 0, 1), where k = (n + h) mod 6 and
    n = 5, 3, 1 for red, green and blue.
    """
    # Products of masks and floor: where, max with its index and % take several times as long on a CPU.
    red, green, blue = images.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    is_red = (value == red).to(images.dtype)
    is_green = (value == green).to(images.dtype) * (1 - is_red)
    is_blue = 1 - is_red - is_green
    sixths = is_red * (green - blue) + is_green * (blue - red) + is_blue * (red - green)
    sixths = sixths / chroma.clamp(min=1e-12) + 2 * is_green + 4 * is_blue + 6 * hue_shift[:, None, None]
    channels = []
    for n in (5, 3, 1):
        k = sixths + n
        k = k - 6 * torch.floor(k / 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    if images.is_contiguous(memory_format=torch.channels_last):
        return torch.stack(channels, dim=-1).permute(0, 3, 1, 2)
    return torch.stack(channels, dim=1)


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [0, 1], keeping their memory format."""
    return images.to(torch.float32).div_(255)


def normalize(images: Tensor) -> Tensor:
    """Normalize float images (B, 3, H, W) in [0, 1] by ImageNet's mean and standard deviation."""
    mean, std = (device_constant(values, images.device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std
