"""SSD300 with a ResNet trunk: images to box deltas and class logits.

B images, A = 8732 anchors, K classes with background 0.
"""

import torch
import torchvision
from torch import Tensor, nn

from ssd.anchors import ANCHORS_PER_CELL

# (input, middle, output channels; stride, padding of the 3x3 convolution) of each extra block.
EXTRA_BLOCKS = (
    (256, 256, 512, 2, 1),
    (512, 256, 512, 2, 1),
    (512, 128, 256, 2, 1),
    (256, 128, 256, 1, 0),
    (256, 128, 256, 1, 0),
)


class Backbone(nn.Module):
    """torchvision's ResNet up to and including layer3, which keeps its stride at 8: 300 px give 38x38."""

    def __init__(self, name: str = "resnet34") -> None:
        super().__init__()
        trunk = torchvision.models.get_model(name, weights=None)
        self.conv1, self.bn1, self.relu, self.maxpool = trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool
        self.layer1, self.layer2, self.layer3 = trunk.layer1, trunk.layer2, trunk.layer3
        for module in self.layer3[0].modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 300, 300) to (B, 256, 38, 38)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return features


class ExtraBlock(nn.Module):
    """1x1 convolution, ReLU, 3x3 convolution, ReLU: the next smaller map."""

    def __init__(self, channels_in: int, middle: int, channels_out: int, stride: int, padding: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, middle, kernel_size=1)
        self.conv2 = nn.Conv2d(middle, channels_out, kernel_size=3, stride=stride, padding=padding)
        for conv in (self.conv1, self.conv2):
            nn.init.xavier_uniform_(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) to (B, channels_out, H', W')."""
        return torch.relu(self.conv2(torch.relu(self.conv1(x))))


class SSD300(nn.Module):
    """SSD300 as in MLPerf Training: ResNet-34 trunk, five extra blocks, one fused head per map.

    A head's channels are, for each anchor of a cell, its 4 deltas and then its K logits.
    """

    def __init__(self, num_classes: int = 81) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = Backbone()
        self.extras = nn.ModuleList(ExtraBlock(*block) for block in EXTRA_BLOCKS)
        channels = (EXTRA_BLOCKS[0][0], *(block[2] for block in EXTRA_BLOCKS))
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
