"""SSD300 with a ResNet trunk: images to box deltas and class logits.

ssd300-r34 is the network of MLPerf Training, ssd300-r50 that of the public SSD300 v1.1: they differ in their trunk,
and in the batch norm of the extra blocks.

B images, A = 8732 anchors, K classes with background 0.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from ssd.anchors import ANCHORS_PER_CELL
from ssd.config import Config

# (channels between the two convolutions; stride, padding of the second) of each extra block.
EXTRA_BLOCKS = ((256, 2, 1), (256, 2, 1), (128, 2, 1), (128, 1, 0), (128, 1, 0))


def map_channels(trunk: str) -> tuple[int, ...]:
    """Channels of the six maps on a trunk, resnet18 to resnet152, as in SSD300 v1.1."""
    trunk_channels = 256 if trunk in ("resnet18", "resnet34") else 1024
    return (trunk_channels, 512, 512, 256, 256, 128 if trunk == "resnet18" else 256)


class Backbone(nn.Module):
    """torchvision's ResNet up to and including layer3, which keeps its stride at 8: 300 px give 38x38."""

    def __init__(self, name: str = "resnet34") -> None:
        super().__init__()
        self.name = name
        trunk = torchvision.models.get_model(name, weights=None)
        self.conv1, self.bn1, self.relu, self.maxpool = trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool
        self.layer1, self.layer2, self.layer3 = trunk.layer1, trunk.layer2, trunk.layer3
        for module in self.layer3[0].modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 300, 300) to (B, 256, 38, 38), from resnet50 on to (B, 1024, 38, 38)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return features


class ExtraBlock(nn.Module):
    """1x1 convolution, ReLU, 3x3 convolution, ReLU: the next smaller map.

    The convolutions have biases, or else batch norm behind them.
    """

    def __init__(
        self, channels_in: int, middle: int, channels_out: int, stride: int, padding: int, *, batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, middle, kernel_size=1, bias=not batch_norm)
        self.bn1 = nn.BatchNorm2d(middle) if batch_norm else nn.Identity()
        self.conv2 = nn.Conv2d(middle, channels_out, kernel_size=3, stride=stride, padding=padding, bias=not batch_norm)
        self.bn2 = nn.BatchNorm2d(channels_out) if batch_norm else nn.Identity()
        for conv in (self.conv1, self.conv2):
            nn.init.xavier_uniform_(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) to (B, channels_out, H', W')."""
        x = torch.relu(normalise(self.bn1, self.conv1(x)))
        return torch.relu(normalise(self.bn2, self.conv2(x)))


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """Batch norm of (B, C, H, W), by its running statistics where a channel has one value, which has no variance.

    That is the last map, of 1x1, of a batch of one image, as the end of an epoch may have one.
    """
    if isinstance(norm, nn.BatchNorm2d) and norm.training and x.numel() == x.shape[1]:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    normalised: Tensor = norm(x)
    return normalised


def make_extras(channels: Sequence[int], *, batch_norm: bool = False) -> nn.ModuleList:
    """The blocks that make each of the maps from the one before it; channels: of all six maps."""
    return nn.ModuleList(
        ExtraBlock(before, middle, after, stride, padding, batch_norm=batch_norm)
        for before, after, (middle, stride, padding) in zip(channels[:-1], channels[1:], EXTRA_BLOCKS, strict=True)
    )


class SSD300(nn.Module):
    """SSD300: ResNet trunk, five extra blocks, one fused head per map. The defaults are those of MLPerf Training.

    batch_norm: in the extra blocks. A head's channels are, for each anchor of a cell, its 4 deltas and then its K
    logits.
    """

    def __init__(self, num_classes: int = 81, trunk: str = "resnet34", *, batch_norm: bool = False) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = Backbone(trunk)
        channels = map_channels(trunk)
        self.extras = make_extras(channels, batch_norm=batch_norm)
        self.heads = nn.ModuleList(
            make_head(c, num_anchors, num_classes) for c, num_anchors in zip(channels, ANCHORS_PER_CELL, strict=True)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 300, 300) normalised images to deltas (B, A, 4) and logits (B, A, K)."""
        x = self.backbone(images)
        predictions = [self.predict(0, x)]
        for level, extra in enumerate(self.extras, start=1):
            x = extra(x)
            predictions.append(self.predict(level, x))
        all_levels = torch.cat(predictions, dim=1)
        return all_levels[..., :4], all_levels[..., 4:]

    def predict(self, level: int, x: Tensor) -> Tensor:
        """Predictions (B, n·H·W, 4 + K) on the map (B, C, H, W) of a level, in the order of the anchors."""
        channels = self.heads[level](x).permute(0, 2, 3, 1)
        per_anchor = channels.unflatten(-1, (ANCHORS_PER_CELL[level], 4 + self.num_classes))
        return per_anchor.permute(0, 3, 1, 2, 4).flatten(1, 3)


def make_head(channels_in: int, num_anchors: int, num_classes: int) -> nn.Conv2d:
    """One 3x3 convolution for boxes and classes, each part initialised as a convolution of its own."""
    head = nn.Conv2d(channels_in, num_anchors * (4 + num_classes), kernel_size=3, padding=1)
    per_anchor = head.weight.detach().unflatten(0, (num_anchors, 4 + num_classes))
    for part in (per_anchor[:, :4], per_anchor[:, 4:]):
        fresh = torch.empty(part.shape[0] * part.shape[1], *part.shape[2:])
        part.copy_(nn.init.xavier_uniform_(fresh).view_as(part))
    return head


def make_model(config: Config) -> SSD300:
    """The network that the settings name, with random weights."""
    return SSD300(config.num_classes, config.trunk_name, batch_norm=config.extras_batch_norm)
