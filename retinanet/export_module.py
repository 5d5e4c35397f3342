"""Exportable RetinaNet: one graph from images to detections, with shapes that do not depend on values.

B images, A_l anchors of level l, K classes without a background, D detections of an image.
"""

import torch
from torch import Tensor, nn

from detection.nn import box_coder
from detection.nn.traceable_nms import select_best, stable_topk
from retinanet.anchors import make_anchors
from retinanet.config import Config
from retinanet.model import HeadOutputs, RetinaNet
from retinanet.resize import normalize_and_resize


class ExportableRetinaNet(nn.Module):
    """Network with preprocessing and postprocessing: images in, detections out.

    The detections are those of `retinanet.postprocess`, in a fixed shape: D = `max_detections` rows per image, best
    first. Unused rows are 0.
    """

    def __init__(self, model: RetinaNet, config: Config) -> None:
        super().__init__()
        self.model, self.config = model, config
        levels = make_anchors(config.image_size, config.image_size, torch.device("cpu"), config.anchor_sizes)
        for level, anchors in enumerate(levels):
            self.register_buffer(f"anchors_{level}", anchors)

    def forward(self, images: Tensor, sizes_hw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map images (B, 3, H, W) uint8 RGB and their sizes without padding (B, 2) int64 to detections.

        Returns boxes (B, D, 4) xyxy in pixels of the image, labels (B, D) from 1, and scores (B, D).
        """
        size = self.config.image_size
        boxes, labels, scores = self.detect(self.model(normalize_and_resize(images, sizes_hw, None, size)))
        return boxes * (sizes_hw.flip(1) / size).repeat(1, 2)[:, None], labels, scores

    def detect(self, outputs: HeadOutputs) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes (B, D, 4) in pixels of the resized images, labels (B, D) and scores (B, D)."""
        config, num_labels = self.config, outputs.logits[0].shape[2]
        boxes, labels, scores = [], [], []
        for level, (logits, deltas) in enumerate(zip(*outputs, strict=True)):
            score, index = top_scores(logits, config.pre_nms_top_n)
            anchor = index // num_labels
            decoded = box_coder.decode(
                deltas.gather(1, anchor[..., None].expand(-1, -1, 4)),
                self.get_buffer(f"anchors_{level}")[anchor],
                legacy=False,
            )
            boxes.append(decoded.clamp(0, config.image_size))
            labels.append(index % num_labels + 1)
            scores.append(score)
        label, order = torch.cat(labels, dim=1).sort(dim=1, stable=True)  # equal scores are ordered by label
        box = torch.cat(boxes, dim=1).gather(1, order[..., None].expand(-1, -1, 4))
        score = torch.cat(scores, dim=1).gather(1, order)
        candidate = torch.where(score > config.score_threshold, score, 0.0)
        top, index = select_best(box, candidate, label, config.nms_threshold, config.max_detections)
        is_kept = top > 0
        top_boxes = box.gather(1, index[..., None].expand(-1, -1, 4))
        return top_boxes * is_kept[..., None], label.gather(1, index) * is_kept, top


def top_scores(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the best `count` scores of each image in logits (B, A, K), and their indices into A · K, both (B, N).

    N is less than `count` if there are fewer scores. Equal scores keep their order. The best scores are among the
    anchors with the best largest score, so that few of the scores are sorted.
    """
    _, num_anchors, num_labels = logits.shape
    _, best = stable_topk(logits.amax(dim=2).sigmoid(), min(count, num_anchors))
    best, _ = best.sort(dim=1, stable=True)
    scores = logits.gather(1, best[..., None].expand(-1, -1, num_labels)).sigmoid().flatten(1)
    top, index = stable_topk(scores, min(count, scores.shape[1]))
    return top, best.gather(1, index // num_labels) * num_labels + index % num_labels
