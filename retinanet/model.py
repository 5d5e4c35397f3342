"""RetinaNet: backbone with a feature pyramid, and two heads that all levels share.

Modules have torchvision's names, so that its weights load. B images, K classes without a background, A_l anchors of
level l.
"""

from typing import NamedTuple

from torch import Tensor, nn
from torchvision.models.detection import retinanet
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detection.nn.resnet_fpn import STAGES, ResNetFPN
from detection.nn.winograd import convolve_levels
from retinanet.anchors import ANCHORS_PER_CELL
from retinanet.config import Config


class HeadOutputs(NamedTuple):
    """Predictions of each level, finest first: logits (B, A_l, K) and deltas (B, A_l, 4)."""

    logits: list[Tensor]
    deltas: list[Tensor]


class RetinaNet(nn.Module):
    """RetinaNet without preprocessing and postprocessing."""

    def __init__(self, config: Config):
        super().__init__()
        channels = config.pyramid_channels
        self.backbone = ResNetFPN(
            config.backbone,
            STAGES[1:],
            LastLevelP6P7(channels, channels),  # P6 comes from P5, since both have as many channels
            num_channels=channels,
            freeze_at=config.freeze_at,
        )
        self.head = retinanet.RetinaNetHead(channels, ANCHORS_PER_CELL, config.num_outputs)
        for head in (self.head.classification_head, self.head.regression_head):
            for block in head.conv:
                nn.init.normal_(block[0].weight, std=config.head_init_std)

    def forward(self, images: Tensor) -> HeadOutputs:
        """Return the predictions for normalized images (B, 3, H, W)."""
        return self.predict(self.backbone(images))

    def predict(self, features: list[Tensor]) -> HeadOutputs:
        """Return the predictions for the pyramid's levels, each (B, C, h, w)."""
        classifier, regressor = self.head.classification_head, self.head.regression_head
        logits = convolve_levels(classifier.cls_logits, convolve_tower(classifier.conv, features))
        deltas = convolve_levels(regressor.bbox_reg, convolve_tower(regressor.conv, features))
        return HeadOutputs(
            [rows_of_anchors(level, classifier.num_classes) for level in logits],
            [rows_of_anchors(level, 4) for level in deltas],
        )


def convolve_tower(blocks: nn.Sequential, levels: list[Tensor]) -> list[Tensor]:
    """Apply a head's convolutions with ReLU to all levels."""
    for conv, activation in (block.children() for block in blocks):
        levels = [activation(level) for level in convolve_levels(conv, levels)]
    return levels


def rows_of_anchors(maps: Tensor, width: int) -> Tensor:
    """Return maps (B, 9·width, h, w) as rows (B, h·w·9, width). Channels-last maps are not copied."""
    return maps.permute(0, 2, 3, 1).reshape(maps.shape[0], -1, width)


def make_model(config: Config) -> RetinaNet:
    """Build the model with random weights; `config.num_classes` must be resolved."""
    return RetinaNet(config)
