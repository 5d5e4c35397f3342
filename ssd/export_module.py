"""Exportable SSD300: one graph from pixels to detections, with shapes that do not depend on values.

Shapes: B images, A anchors, K classes (0 is background), C = K - 1 object classes, W candidates per class,
D detections per image.
"""

import torch
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop

from detection.boxes import pairwise_iou
from ssd import augment
from ssd.anchors import Anchors, make_anchors
from ssd.box_coder import decode


class ExportableSSD(nn.Module):
    """Network with preprocessing and postprocessing: images in, detections out.

    The detections are those of `ssd.postprocess`, in a fixed shape: D = `max_detections` rows per image, best first.
    Unused rows have score 0 and label 0.
    """

    anchors_cxcywh: Tensor
    anchors_xyxy: Tensor

    def __init__(self, model: nn.Module, *, score_threshold: float, nms_threshold: float, max_detections: int) -> None:
        super().__init__()
        self.model = model
        self.score_threshold, self.nms_threshold, self.max_detections = score_threshold, nms_threshold, max_detections
        anchors = make_anchors()
        self.register_buffer("anchors_cxcywh", anchors.boxes_cxcywh)  # nn.Buffer needs torch 2.5
        self.register_buffer("anchors_xyxy", anchors.boxes_xyxy)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map images (B, 3, 300, 300) uint8 RGB to boxes (B, D, 4), labels (B, D) and scores (B, D).

        The boxes are xyxy, normalized and not clipped.
        """
        return self.detect(*self.model(augment.normalize(augment.to_float(images))))

    def detect(self, deltas: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map deltas (B, A, 4) and logits (B, A, K) to boxes (B, D, 4), labels and scores (B, D)."""
        scores = logits.float().softmax(dim=-1)[..., 1:].transpose(1, 2)  # (B, C, A)
        score, anchor = stable_topk(scores, self.max_detections)  # (B, C, W)
        candidate = score > self.score_threshold
        rows = torch.arange(deltas.shape[0], device=deltas.device)[:, None, None]
        anchors = Anchors(self.anchors_cxcywh, self.anchors_xyxy)
        boxes = decode(deltas[rows, anchor].float(), anchors[anchor])
        score = torch.where(nms_keep_mask(boxes, candidate, self.nms_threshold), score, 0).flatten(1)
        score, index = stable_topk(score, self.max_detections)
        labels = torch.where(score > 0, index // anchor.shape[-1] + 1, 0)
        boxes = boxes.flatten(1, 2).gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
        return boxes, labels, score


def stable_topk(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest values of the last dimension, and their indices. Ties keep their order."""
    values, indices = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :count], indices[..., :count]


def nms_keep_mask(boxes_xyxy: Tensor, candidate: Tensor, nms_threshold: float) -> Tensor:
    """Apply NMS to the candidates (B, C, W) among boxes (B, C, W, 4), sorted best first: (B, C, W) bool.

    The loop is that of `ssd.postprocess.nms_keep_mask`.
    """
    width = candidate.shape[-1]
    better = torch.ones(width, width, dtype=torch.bool, device=boxes_xyxy.device).triu(1)
    suppresses = ((pairwise_iou(boxes_xyxy, boxes_xyxy) >= nms_threshold) & better).float()

    def cond(keep: Tensor, previous: Tensor, suppresses: Tensor, candidate: Tensor) -> Tensor:
        return (keep != previous).any()

    def body(
        keep: Tensor, previous: Tensor, suppresses: Tensor, candidate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        is_suppressed = torch.matmul(keep.unsqueeze(-2).float(), suppresses).squeeze(-2) > 0
        return candidate & ~is_suppressed, keep.clone(), suppresses.clone(), candidate.clone()

    keep: Tensor = while_loop(cond, body, (candidate, ~candidate, suppresses, candidate.clone()))[0]
    return keep
