"""Backbone: a ResNet with frozen batch norm and a feature pyramid network.

Modules and their names are torchvision's, so that its weights load. B images, H and W of the padded images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from detection.nn.resnet import conv_frozen_bn, residual_forward
from detection.runtime.device import device_constant
from maskrcnn.config import Config, InputFormat

NUM_CHANNELS = 256  # of each level of the pyramid
STAGES = ("layer1", "layer2", "layer3", "layer4")

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


class ResNetFPN(nn.Module):
    """torchvision's ResNet and feature pyramid: images to the five levels P2 to P6."""

    def __init__(self, config: Config):
        super().__init__()
        body = getattr(resnet, config.backbone)(weights=None)
        widths = [
            getattr(body, stage)[-1].conv2.out_channels * type(getattr(body, stage)[-1]).expansion for stage in STAGES
        ]
        del body.fc, body.avgpool
        self.body = body
        self.fpn = FeaturePyramidNetwork(widths, NUM_CHANNELS, extra_blocks=LastLevelMaxPool())
        for module in body.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = config.batch_norm_eps
            elif isinstance(module, resnet.Bottleneck) and config.stride_in_1x1:
                module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
        if config.freeze_at:
            for frozen in (body.conv1, body.bn1, *(getattr(body, stage) for stage in STAGES[: config.freeze_at])):
                frozen.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return P2 to P6, each (B, 256, h, w), of normalized images (B, 3, H, W)."""
        x = F.relu(conv_frozen_bn(images, self.body.conv1, self.body.bn1))
        x = self.body.maxpool(x)
        levels = {}
        for stage in STAGES:
            for module in getattr(self.body, stage):
                x = residual_forward(x, module)
            levels[stage] = x
        return list(self.fpn(levels).values())
