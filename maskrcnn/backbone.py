"""The features: a ResNet with frozen batch norm under a feature pyramid.

The modules are torchvision's and so are their names, so that its weights fit. B images, H and W of padded images.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from detection.runtime.device import constant

NUM_CHANNELS = 256  # of each level of the pyramid
STAGES = ("layer1", "layer2", "layer3", "layer4")

Pixels = Literal["caffe-bgr", "imagenet-rgb"]
"""What the weights of a trunk were trained on: BGR from 0 to 255 less its mean, or RGB of mean 0 and variance 1."""

# Mean and standard deviation of ImageNet, on a scale from 0 to 255, in the order of the channels.
STATISTICS = {
    "caffe-bgr": ((102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0)),
    "imagenet-rgb": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}


def normalise(images: Tensor, sizes_hw: Tensor, pixels: Pixels) -> Tensor:
    """Images (B, 3, H, W) uint8 RGB as the network sees them, float32; 0 outside of sizes_hw (B, 2)."""
    mean, deviation = (constant(values, images.device)[:, None, None] for values in STATISTICS[pixels])
    images = ((images.flip(1) if pixels == "caffe-bgr" else images) - mean) / deviation
    rows, columns = (torch.arange(size, device=images.device) for size in images.shape[2:])
    inside = (rows < sizes_hw[:, :1])[:, :, None] & (columns < sizes_hw[:, 1:])[:, None, :]
    return images * inside[:, None]


class Trunk(nn.Module):
    """Images to the five levels of the pyramid, P2 to P6.

    name: of torchvision's ResNet. stride_in_1x1: whether a block that halves its input does so in its first 1×1
    convolution, as the original ResNet of MSRA, or in its 3×3 one, as torchvision. freeze_at: of stem and layer1
    (stage 2 of the paper) and on, how many are not trained. batch_norm_eps: 0 where the weights have it in them.
    """

    def __init__(self, name: str, *, stride_in_1x1: bool, freeze_at: int, batch_norm_eps: float):
        super().__init__()
        body = getattr(resnet, name)(weights=None)
        widths = [
            getattr(body, stage)[-1].conv2.out_channels * type(getattr(body, stage)[-1]).expansion for stage in STAGES
        ]
        del body.fc, body.avgpool
        self.body = body
        self.fpn = FeaturePyramidNetwork(widths, NUM_CHANNELS, extra_blocks=LastLevelMaxPool())
        for module in body.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = batch_norm_eps
            elif isinstance(module, resnet.Bottleneck) and stride_in_1x1:
                module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
        if freeze_at:
            for frozen in (body.conv1, body.bn1, *(getattr(body, stage) for stage in STAGES[:freeze_at])):
                frozen.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """P2 to P6, (B, 256, h, w) each, of images (B, 3, H, W) that are normalised."""
        x = F.relu(convolve(images, self.body.conv1, self.body.bn1))
        x = self.body.maxpool(x)
        levels = {}
        for stage in STAGES:
            for module in getattr(self.body, stage):
                x = block(x, module)
            levels[stage] = x
        return list(self.fpn(levels).values())


def block(x: Tensor, module: resnet.BasicBlock | resnet.Bottleneck) -> Tensor:
    """What a residual block makes of x."""
    skip = x if module.downsample is None else convolve(x, *module.downsample)
    out = F.relu(convolve(x, module.conv1, module.bn1))
    out = convolve(out, module.conv2, module.bn2)
    if isinstance(module, resnet.Bottleneck):
        out = convolve(F.relu(out), module.conv3, module.bn3)
    return F.relu(out + skip)


def convolve(x: Tensor, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """Convolution and batch norm; where that is frozen, as one convolution with its factor in the weights.

    It saves three passes over the features: the frozen norm of a 200 × 336 × 256 map costs more than its convolution.
    """
    if norm.training:
        return norm(convolution(x))
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return F.conv2d(
        x,
        convolution.weight * scale[:, None, None, None],
        norm.bias - norm.running_mean * scale,
        convolution.stride,
        convolution.padding,
    )
