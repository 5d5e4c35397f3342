"""Residual blocks of torchvision's ResNets, with batch norm that is folded into its convolution while it is frozen."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet


def residual_forward(x: Tensor, block: resnet.BasicBlock | resnet.Bottleneck) -> Tensor:
    """Apply a residual block with `conv_frozen_bn`."""
    skip = x if block.downsample is None else conv_frozen_bn(x, *block.downsample)
    out = F.relu(conv_frozen_bn(x, block.conv1, block.bn1))
    out = conv_frozen_bn(out, block.conv2, block.bn2)
    if isinstance(block, resnet.Bottleneck):
        out = conv_frozen_bn(F.relu(out), block.conv3, block.bn3)
    return F.relu(out + skip)


def conv_frozen_bn(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """Apply convolution and batch norm, as a single convolution with folded weights if the norm is frozen.

    Folding saves three passes over the features: the frozen norm of a 200 × 336 × 256 map costs more than its
    convolution.
    """
    if norm.training:
        return norm(conv(x))
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight, bias = conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
    return conv._conv_forward(x, weight, bias)
