"""Backbone and its input. B images, H and W of the padded images."""

import torch
from torch import Tensor
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from detection.nn.resnet_fpn import STAGES, ResNetFPN
from detection.runtime.device import device_constant
from maskrcnn.config import Config, InputFormat

# Mean and standard deviation of ImageNet, 0 to 255, in channel order.
PIXEL_MEAN_STD = {
    "caffe-bgr": ((102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0)),
    "imagenet-rgb": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}


def normalize(images: Tensor, sizes_hw: Tensor, input_format: InputFormat) -> Tensor:
    """Normalize images (B, 3, H, W) uint8 RGB to float32, with zeros outside sizes_hw (B, 2)."""
    mean, std = (device_constant(values, images.device)[:, None, None] for values in PIXEL_MEAN_STD[input_format])
    images = ((images.flip(1) if input_format == "caffe-bgr" else images) - mean) / std
    rows, columns = (torch.arange(size, device=images.device) for size in images.shape[2:])
    is_image = (rows < sizes_hw[:, :1])[:, :, None] & (columns < sizes_hw[:, 1:])[:, None, :]
    return images * is_image[:, None]


def make_backbone(config: Config) -> ResNetFPN:
    """Build the backbone: images to the five levels P2 to P6."""
    return ResNetFPN(
        config.backbone,
        STAGES,
        LastLevelMaxPool(),
        freeze_at=config.freeze_at,
        batch_norm_eps=config.batch_norm_eps,
        stride_in_1x1=config.stride_in_1x1,
    )
