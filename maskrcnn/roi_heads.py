"""What a region shows: its class, a tighter box (Fast R-CNN, section 2) and the object's mask (Mask R-CNN, section 3).

R regions, K classes with background 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from maskrcnn.backbone import NUM_CHANNELS

BOX_CELLS, MASK_CELLS = 7, 14
MASK_SIZE = 2 * MASK_CELLS
BOX_WIDTH = 1024
MASK_LAYERS = (256, 256, 256, 256)


class BoxHead(nn.Module):
    """Aligned regions to logits and deltas of every class."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.features = TwoMLPHead(NUM_CHANNELS * BOX_CELLS**2, BOX_WIDTH)
        self.predictor = FastRCNNPredictor(BOX_WIDTH, num_classes)
        for layer in (self.features.fc6, self.features.fc7):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        for layer, deviation in ((self.predictor.cls_score, 0.01), (self.predictor.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, K) and deltas (R, K, 4), float32, of regions (R, 256, 7, 7)."""
        logits, deltas = self.predictor(self.features(regions))
        return logits.float(), deltas.float().view(*logits.shape, 4)


class MaskHead(nn.Module):
    """Aligned regions to the masks of one class each."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.features = MaskRCNNHeads(NUM_CHANNELS, MASK_LAYERS, dilation=1)
        self.predictor = MaskRCNNPredictor(MASK_LAYERS[-1], MASK_LAYERS[-1], num_classes)

    def forward(self, regions: Tensor, labels: Tensor) -> Tensor:
        """Logits (R, 28, 28), float32, of the mask of class labels (R,) in regions (R, 256, 14, 14).

        The last layer is computed for that class alone: the others' masks take no part in loss or detections.
        """
        features = F.relu(self.predictor.conv5_mask(self.features(regions)))
        last = self.predictor.mask_fcn_logits
        weight = last.weight[labels].flatten(1).to(features.dtype)  # (R, 256)
        logits = torch.einsum("rchw,rc->rhw", features, weight)
        return logits.float() + last.bias[labels, None, None]
