"""SSD300 from pixels to detections as one graph that can be exported.

B images, A anchors, K classes with background 0, C = K - 1 of them, W candidates of a class, D detections of an image.
"""

import torch
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop

from detection.boxes import pairwise_iou
from ssd import augment
from ssd.anchors import Anchors, make_anchors
from ssd.box_coder import decode


class Detector(nn.Module):
    """The network, with what comes before and after it: images in, detections out.

    What `ssd.postprocess` finds, in shapes that do not depend on the values: each image has D = `max_detections` rows, the
    best first, and rows of score 0 and label 0 where it has fewer.
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
        """(B, 3, 300, 300) uint8 RGB to boxes (B, D, 4) xyxy, normalised, not clipped; labels and scores (B, D)."""
        return self.detect(*self.model(augment.normalise(augment.to_unit(images))))

    def detect(self, deltas: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As forward, of deltas (B, A, 4) and logits (B, A, K)."""
        scores = logits.float().softmax(dim=-1)[..., 1:].transpose(1, 2)  # (B, C, A)
        score, anchor = best(scores, self.max_detections)  # (B, C, W)
        candidate = score > self.score_threshold
        rows = torch.arange(deltas.shape[0], device=deltas.device)[:, None, None]
        anchors = Anchors(self.anchors_cxcywh, self.anchors_xyxy)
        boxes = decode(deltas[rows, anchor].float(), anchors[anchor])
        score = torch.where(stay(boxes, candidate, self.nms_threshold), score, 0).flatten(1)
        score, place = best(score, self.max_detections)
        labels = torch.where(score > 0, place // anchor.shape[-1] + 1, 0)
        boxes = boxes.flatten(1, 2).gather(1, place.unsqueeze(-1).expand(-1, -1, 4))
        return boxes, labels, score


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of the last dimension, falling, and their places; of equal ones the first, as `ssd.postprocess` has it."""
    values, places = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :count], places[..., :count]


def stay(boxes_xyxy: Tensor, candidate: Tensor, nms_threshold: float) -> Tensor:
    """Which boxes (B, C, W, 4) of each class, best first, stay: (B, C, W) bool, of those that are candidates.

    As `ssd.postprocess.stay`: applied until nothing changes, the rule gives what it gives box after box.
    """
    width = candidate.shape[-1]
    better = torch.ones(width, width, dtype=torch.bool, device=boxes_xyxy.device).triu(1)
    beats = ((pairwise_iou(boxes_xyxy, boxes_xyxy) >= nms_threshold) & better).float()

    def changed(keep: Tensor, before: Tensor, beats: Tensor, candidate: Tensor) -> Tensor:
        return (keep != before).any()

    def again(keep: Tensor, before: Tensor, beats: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        beaten = torch.matmul(keep.unsqueeze(-2).float(), beats).squeeze(-2) > 0
        return candidate & ~beaten, keep.clone(), beats.clone(), candidate.clone()

    keep: Tensor = while_loop(changed, again, (candidate, ~candidate, beats, candidate.clone()))[0]
    return keep
