"""Resize of whole images on the device, to a square and without keeping the aspect ratio.

Bilinear without antialiasing, as the MLPerf reference does with torch.nn.functional.interpolate: each pixel of the
result reads at most four pixels of the image. B images, H and W of the padded batch, S side of the result.
"""

import torch
from torch import Tensor

from detection.runtime.device import device_constant

# Mean and standard deviation of ImageNet, in RGB from 0 to 1.
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalize_and_resize(images: Tensor, sizes_hw: Tensor, flips: Tensor | None, size_px: int) -> Tensor:
    """Return normalized images (B, 3, S, S) float32, channels last, of padded images (B, 3, H, W) uint8.

    sizes_hw: (B, 2) without the padding. flips: (B,) bool, horizontal, or None. The reference normalizes first, which
    gives the same result up to rounding, since the weights of a pixel add up to 1.
    """
    rows, row_weight = source_pixels(sizes_hw[:, 0], size_px)
    columns, column_weight = source_pixels(sizes_hw[:, 1], size_px)
    if flips is not None:
        columns, column_weight = (
            torch.where(flips[:, None], values.flip(-1), values) for values in (columns, column_weight)
        )
    pixels = images.permute(0, 2, 3, 1)  # the three channels of a pixel are read together
    image = torch.arange(images.shape[0], device=images.device)[:, None, None]

    def resized_row(row: Tensor) -> Tensor:
        left, right = (pixels[image, row[:, :, None], column[:, None, :]].float() for column in columns)
        return left + (right - left) * column_weight[:, None, :, None]

    top, bottom = map(resized_row, rows)
    resized = top + (bottom - top) * row_weight[:, :, None, None]
    mean, std = (device_constant(values, images.device) for values in (PIXEL_MEAN, PIXEL_STD))
    return ((resized / 255 - mean) / std).permute(0, 3, 1, 2)


def source_pixels(lengths: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the two pixels (2, B, size) that each result pixel reads, and the weight (B, size) of the second one.

    lengths: (B,) pixels of the images along this axis.
    """
    scale = lengths.float() / size
    position = (scale[:, None] * (torch.arange(size, device=lengths.device) + 0.5) - 0.5).clamp(min=0)
    first = position.long()
    second = (first + 1).minimum(lengths[:, None] - 1)
    return torch.stack([first, second]), position - first


def resize_boxes(boxes_xyxy: Tensor, sizes_hw: Tensor, flips: Tensor | None, size_px: int) -> Tensor:
    """Return the boxes (B, G, 4) in pixels of the resized images; flips as in `normalize_and_resize`."""
    if flips is not None:
        width = sizes_hw[:, 1, None].to(boxes_xyxy)
        left, top, right, bottom = boxes_xyxy.unbind(dim=-1)
        flipped = torch.stack([width - right, top, width - left, bottom], dim=-1)
        boxes_xyxy = torch.where(flips[:, None, None], flipped, boxes_xyxy)
    sizes_wh = sizes_hw.flip(1).to(boxes_xyxy)
    ratios = torch.full_like(sizes_wh, size_px) / sizes_wh  # a number over a tensor would multiply by the reciprocal
    return boxes_xyxy * ratios.repeat(1, 2)[:, None]
