"""The multibox loss with hard negative mining (SSD paper, sections 2.2 and 3).

B images, A anchors, K classes with background 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("box", "class")
NEGATIVES_PER_POSITIVE = 3


def multibox_loss(pred_deltas: Tensor, logits: Tensor, deltas: Tensor, labels: Tensor) -> Tensor:
    """Loss of each image, of its boxes and of its classes, (B, 2) float32; 0 without a positive anchor.

    pred_deltas: (B, A, 4); logits: (B, A, K); deltas: (B, A, 4) and labels: (B, A) from `box_coder.encode`.
    Smooth L1 over the positives, cross-entropy over the positives and the three times as many negatives that
    are hardest, both divided by the number of positives.
    """
    positive = labels > 0
    num_positive = positive.sum(dim=1)

    box_loss = F.smooth_l1_loss(pred_deltas.float(), deltas, reduction="none").sum(dim=-1)
    box_loss = (box_loss * positive).sum(dim=1)

    # A flat (N, K) input keeps the softmax on its fast path; a (B, K, A) one strides through memory.
    class_loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    # One sort is enough: what is summed are the largest values themselves, so no ranks are needed.
    hardest = class_loss.masked_fill(positive, 0).sort(dim=1, descending=True).values
    rank = torch.arange(labels.shape[1], device=labels.device)
    mined = (hardest * (rank < NEGATIVES_PER_POSITIVE * num_positive.unsqueeze(1))).sum(dim=1)
    class_loss = (class_loss * positive).sum(dim=1) + mined

    parts = torch.stack([box_loss, class_loss], dim=1)
    return torch.where(num_positive[:, None] > 0, parts / num_positive.clamp(min=1)[:, None], 0)
