"""Exportable SSD300: one graph from pixels to detections, with shapes that do not depend on values.

Shapes: B images, A anchors, K classes (0 is background), C = K - 1 object classes, W candidates per class,
D detections per image.
"""

import torch
from torch import Tensor, nn

from detection.nn.traceable_nms import nms_keep_mask, stable_topk
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
        score = torch.where(nms_keep_mask(boxes, candidate, self.nms_threshold, drop_equal=True), score, 0).flatten(1)
        score, index = stable_topk(score, self.max_detections)
        labels = torch.where(score > 0, index // anchor.shape[-1] + 1, 0)
        boxes = boxes.flatten(1, 2).gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
        return boxes, labels, score
