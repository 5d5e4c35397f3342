"""ROI heads: class and refined box (Fast R-CNN, section 2), and mask (Mask R-CNN, section 3).

R ROIs, K classes with background 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from detection.nn.resnet_fpn import NUM_CHANNELS

BOX_POOL_SIZE, MASK_POOL_SIZE = 7, 14
MASK_SIZE = 2 * MASK_POOL_SIZE
BOX_HEAD_DIM = 1024
MASK_HEAD_DIMS = (256, 256, 256, 256)


class BoxHead(nn.Module):
    """Head that classifies aligned ROIs and refines their boxes for every class."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.features = TwoMLPHead(NUM_CHANNELS * BOX_POOL_SIZE**2, BOX_HEAD_DIM)
        self.predictor = FastRCNNPredictor(BOX_HEAD_DIM, num_classes)
        for layer in (self.features.fc6, self.features.fc7):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        for layer, std in ((self.predictor.cls_score, 0.01), (self.predictor.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, rois: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (R, K) and deltas (R, K, 4), float32, of ROIs (R, 256, 7, 7)."""
        logits, deltas = self.predictor(self.features(rois))
        return logits.float(), deltas.float().view(*logits.shape, 4)


class MaskHead(nn.Module):
    """Head that predicts the mask of one class for each aligned ROI."""

    def __init__(self, num_classes: int, *, zero_biases: bool = True):
        super().__init__()
        self.features = MaskRCNNHeads(NUM_CHANNELS, MASK_HEAD_DIMS, dilation=1)
        self.predictor = MaskRCNNPredictor(MASK_HEAD_DIMS[-1], MASK_HEAD_DIMS[-1], num_classes)
        if zero_biases:  # torchvision leaves these two as drawn
            for layer in (self.predictor.conv5_mask, self.predictor.mask_fcn_logits):
                nn.init.zeros_(layer.bias)

    def forward(self, rois: Tensor, labels: Tensor) -> Tensor:
        """Return mask logits (R, 28, 28), float32, of class labels (R,) in ROIs (R, 256, 14, 14).

        Computes the last layer for that class only: masks of other classes enter neither loss nor detections.
        """
        features = F.relu(self.predictor.conv5_mask(self.features(rois)))
        last = self.predictor.mask_fcn_logits
        weight = last.weight[labels].flatten(1).to(features.dtype)  # (R, 256)
        logits = torch.einsum("rchw,rc->rhw", features, weight)
        return logits.float() + last.bias[labels, None, None]
