"""Multibox loss with hard negative mining (SSD paper, sections 2.2 and 3).

Nearly all anchors are background. Hard negative mining keeps them from dominating the loss: only the negatives with
the largest classification loss count, three per positive.

Shapes: B images, A anchors, K classes (0 is background).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LOSS_NAMES = ("box", "class")
NEGATIVES_PER_POSITIVE = 3


def multibox_loss(
    pred_deltas: Tensor, logits: Tensor, deltas: Tensor, labels: Tensor, *, train_background: bool = False
) -> Tensor:
    """Return the box loss and the class loss of each image: (B, 2) float32, 0 without a positive anchor.

    pred_deltas: (B, A, 4). logits: (B, A, K). deltas: (B, A, 4) and labels: (B, A) from `box_coder.encode`.
    The box loss is smooth L1 over the positives. The class loss is cross-entropy over the positives and the hardest
    negatives, three per positive. Both are divided by the number of positives.
    train_background: an image without a positive anchor has the class loss of its three hardest negatives.
    """
    positive = labels > 0
    num_positive = positive.sum(dim=1)
    if train_background:
        num_positive = num_positive.clamp(min=1)

    box_loss = F.smooth_l1_loss(pred_deltas.float(), deltas, reduction="none").sum(dim=-1)
    box_loss = (box_loss * positive).sum(dim=1)

    # A flat (N, K) input keeps the softmax on its fast path. A (B, K, A) input would stride through memory.
    class_loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    # One sort suffices: the sum takes the largest values themselves, so the reference's ranks are not needed.
    hardest = class_loss.masked_fill(positive, 0).sort(dim=1, descending=True).values
    rank = torch.arange(labels.shape[1], device=labels.device)
    hard_negative_loss = (hardest * (rank < NEGATIVES_PER_POSITIVE * num_positive.unsqueeze(1))).sum(dim=1)
    class_loss = (class_loss * positive).sum(dim=1) + hard_negative_loss

    parts = torch.stack([box_loss, class_loss], dim=1)
    return torch.where(num_positive[:, None] > 0, parts / num_positive.clamp(min=1)[:, None], 0)
