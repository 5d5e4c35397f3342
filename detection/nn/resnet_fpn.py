"""Backbone: torchvision's ResNet and feature pyramid network, with module names under which its weights load."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from detection.nn.resnet import conv_frozen_bn, residual_forward
from detection.runtime.device import match_memory_format

STAGES = ("layer1", "layer2", "layer3", "layer4")
NUM_CHANNELS = 256  # of each level of the pyramid, in the references


class ResNetFPN(nn.Module):
    """ResNet and feature pyramid: images to the pyramid levels, finest first.

    pyramid_stages: stages whose outputs enter the pyramid. extra_blocks: adds levels beyond the last stage.
    num_channels: of each level. freeze_at: number of stages that are not trained, besides the stem; 0 trains the
    stem, too. stride_in_1x1: the first convolution of a bottleneck has the stride, as in MSRA's weights, instead of the
    second.
    """

    def __init__(
        self,
        backbone: str,
        pyramid_stages: Sequence[str],
        extra_blocks: ExtraFPNBlock,
        *,
        num_channels: int = NUM_CHANNELS,
        freeze_at: int,
        batch_norm_eps: float = 1e-5,
        stride_in_1x1: bool = False,
    ):
        super().__init__()
        body = getattr(resnet, backbone)(weights=None)
        last_blocks = [getattr(body, stage)[-1] for stage in pyramid_stages]
        widths = [getattr(block, "conv3", block.conv2).out_channels for block in last_blocks]
        del body.fc, body.avgpool
        self.body, self.pyramid_stages = body, tuple(pyramid_stages)
        self.fpn = FeaturePyramidNetwork(widths, num_channels, extra_blocks=extra_blocks)
        for module in body.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = batch_norm_eps
            elif isinstance(module, resnet.Bottleneck) and stride_in_1x1:
                module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
        if freeze_at:
            for frozen in (body.conv1, body.bn1, *(getattr(body, stage) for stage in STAGES[:freeze_at])):
                frozen.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the levels of the pyramid, each (B, num_channels, h, w), of normalized images (B, 3, H, W)."""
        images = match_memory_format(images, self.body.conv1.weight)
        x = F.relu(conv_frozen_bn(images, self.body.conv1, self.body.bn1))
        x = self.body.maxpool(x)
        levels = {}
        for stage in STAGES:
            for block in getattr(self.body, stage):
                x = residual_forward(x, block)
            if stage in self.pyramid_stages:
                levels[stage] = x
        return list(self.fpn(levels).values())
