"""SSD300 network: images to box deltas and class logits.

A ResNet backbone computes the first feature map, and each of five extra blocks computes the next smaller one. One
3x3 convolution per map, the head, predicts four box deltas and K class logits for every anchor.

ssd300-r34 is the network of MLPerf Training. ssd300-r50 is the network of the public SSD300 v1.1: it has another
backbone, and batch norm in the extra blocks.

Shapes: B images, A = 8732 anchors, K classes (0 is background).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from detection.runtime.device import match_memory_format
from ssd.anchors import ANCHORS_PER_CELL
from ssd.config import Config

# For each extra block: channels between its two convolutions, and stride and padding of the second convolution.
EXTRA_BLOCKS = ((256, 2, 1), (256, 2, 1), (128, 2, 1), (128, 1, 0), (128, 1, 0))


def feature_map_channels(backbone: str) -> tuple[int, ...]:
    """Return the channels of the six feature maps on a backbone, resnet18 to resnet152, as in SSD300 v1.1."""
    backbone_channels = 256 if backbone in ("resnet18", "resnet34") else 1024
    return (backbone_channels, 512, 512, 256, 256, 128 if backbone == "resnet18" else 256)


class Backbone(nn.Module):
    """torchvision's ResNet up to and including layer3, here with stride 1. The total stride is 8: 300 px give 38x38."""

    def __init__(self, name: str = "resnet34") -> None:
        super().__init__()
        self.name = name
        resnet = torchvision.models.get_model(name, weights=None)
        self.conv1, self.bn1, self.relu, self.maxpool = resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool
        self.layer1, self.layer2, self.layer3 = resnet.layer1, resnet.layer2, resnet.layer3
        for module in self.layer3[0].modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, 300, 300) to features (B, 256, 38, 38). From resnet50 upward, C is 1024."""
        images = match_memory_format(images, self.conv1.weight)
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return features


class ExtraBlock(nn.Module):
    """Block that computes the next smaller feature map: 1x1 convolution, ReLU, 3x3 convolution, ReLU.

    The convolutions have biases. With batch_norm, batch norm follows each convolution instead.
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        stride: int,
        padding: int,
        *,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, mid_channels, kernel_size=1, bias=not batch_norm)
        self.bn1 = nn.BatchNorm2d(mid_channels) if batch_norm else nn.Identity()
        self.conv2 = nn.Conv2d(
            mid_channels, out_channels, kernel_size=3, stride=stride, padding=padding, bias=not batch_norm
        )
        self.bn2 = nn.BatchNorm2d(out_channels) if batch_norm else nn.Identity()
        for conv in (self.conv1, self.conv2):
            nn.init.xavier_uniform_(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H', W')."""
        x = torch.relu(batch_norm_or_running(self.bn1, self.conv1(x)))
        return torch.relu(batch_norm_or_running(self.bn2, self.conv2(x)))


def batch_norm_or_running(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply batch norm to (B, C, H, W), with running statistics if each channel has a single value.

    A single value has no variance. This occurs on the last map, 1x1, if an epoch ends with a batch of one image.
    """
    if isinstance(norm, nn.BatchNorm2d) and norm.training and x.numel() == x.shape[1]:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    normalized: Tensor = norm(x)
    return normalized


def make_extras(channels: Sequence[int], *, batch_norm: bool = False) -> nn.ModuleList:
    """Build the five extra blocks. channels: channels of the six feature maps."""
    return nn.ModuleList(
        ExtraBlock(c_in, c_mid, c_out, stride, padding, batch_norm=batch_norm)
        for c_in, c_out, (c_mid, stride, padding) in zip(channels[:-1], channels[1:], EXTRA_BLOCKS, strict=True)
    )


class SSD300(nn.Module):
    """SSD300: ResNet backbone, five extra blocks, one fused head per feature map.

    The defaults are those of MLPerf Training. batch_norm: use batch norm in the extra blocks. The channels of a head
    are, for each anchor of a cell, its 4 deltas and then its K logits.
    """

    def __init__(self, num_classes: int = 81, backbone: str = "resnet34", *, batch_norm: bool = False) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = Backbone(backbone)
        channels = feature_map_channels(backbone)
        self.extras = make_extras(channels, batch_norm=batch_norm)
        self.heads = nn.ModuleList(
            make_head(c, num_anchors, num_classes) for c, num_anchors in zip(channels, ANCHORS_PER_CELL, strict=True)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map normalized images (B, 3, 300, 300) to deltas (B, A, 4) and logits (B, A, K)."""
        x = self.backbone(images)
        predictions = [self.predict_level(0, x)]
        for level, extra in enumerate(self.extras, start=1):
            x = extra(x)
            predictions.append(self.predict_level(level, x))
        all_levels = torch.cat(predictions, dim=1)
        return all_levels[..., :4], all_levels[..., 4:]

    def predict_level(self, level: int, x: Tensor) -> Tensor:
        """Predict (B, n·H·W, 4 + K) from the feature map (B, C, H, W) of a level, in the order of the anchors."""
        channels = self.heads[level](x).permute(0, 2, 3, 1)
        per_anchor = channels.unflatten(-1, (ANCHORS_PER_CELL[level], 4 + self.num_classes))
        return per_anchor.permute(0, 3, 1, 2, 4).flatten(1, 3)


def make_head(in_channels: int, num_anchors: int, num_classes: int) -> nn.Conv2d:
    """Build one 3x3 convolution for boxes and classes. Initialize each part like a separate convolution."""
    head = nn.Conv2d(in_channels, num_anchors * (4 + num_classes), kernel_size=3, padding=1)
    per_anchor = head.weight.detach().unflatten(0, (num_anchors, 4 + num_classes))
    for part in (per_anchor[:, :4], per_anchor[:, 4:]):
        weight = torch.empty(part.shape[0] * part.shape[1], *part.shape[2:])
        part.copy_(nn.init.xavier_uniform_(weight).view_as(part))
    return head


def make_model(config: Config) -> SSD300:
    """Build the network of the settings, with random weights."""
    return SSD300(config.num_classes, config.backbone_name, batch_norm=config.extras_batch_norm)
