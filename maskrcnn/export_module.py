"""Exportable Mask R-CNN: one graph from pixels to detections, with shapes that do not depend on values.

B images of H × W pixels with padding, A anchors of a level, P proposals and D detections of an image, K classes with
background 0, S side of a mask (28).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.nn import box_coder
from detection.nn.traceable_nms import nms_keep_mask, select_best, stable_topk
from maskrcnn.anchors import STRIDES_PX, make_level_anchors
from maskrcnn.backbone import normalize
from maskrcnn.model import MaskRCNN
from maskrcnn.postprocess import MIN_DETECTION_PX
from maskrcnn.roi_align import flatten_rois
from maskrcnn.roi_heads import BOX_POOL_SIZE, MASK_POOL_SIZE, MASK_SIZE
from maskrcnn.rpn import MIN_PROPOSAL_PX


class ExportableMaskRCNN(nn.Module):
    """Network with preprocessing and postprocessing: images in, detections out.

    The detections are those of `MaskRCNN.detect`, in a fixed shape: D = `max_detections` rows per image, best first.
    Unused rows are 0.
    """

    def __init__(self, model: MaskRCNN) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, images: Tensor, sizes_hw: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map images (B, 3, H, W) uint8 RGB and their sizes without padding (B, 2) int64 to detections.

        Returns boxes (B, D, 4), labels (B, D), scores (B, D) and masks (B, D, S, S), as in `postprocess.Detections`.
        """
        model = self.model
        features = model.backbone(normalize(images, sizes_hw, self.config.input_format))
        proposals, valid = self.generate_proposals(features, sizes_hw)
        shape = proposals.shape[:2]
        logits, deltas = model.box_head(model.roi_pool(features[:4], flatten_rois(proposals), BOX_POOL_SIZE))
        boxes, labels, scores = self.select_detections(
            logits.unflatten(0, shape), deltas.unflatten(0, shape), proposals, valid, sizes_hw
        )
        pooled = model.roi_pool(features[:4], flatten_rois(boxes), MASK_POOL_SIZE)
        masks = model.mask_head(pooled, labels.flatten()).sigmoid().view(*labels.shape, MASK_SIZE, MASK_SIZE)
        return boxes, labels, scores, masks * (labels > 0)[..., None, None]

    def generate_proposals(self, features: list[Tensor], sizes_hw: Tensor) -> tuple[Tensor, Tensor]:
        """Return the proposals (B, P, 4), best first, and which of them (B, P) are no padding."""
        config, legacy = self.config, self.config.legacy_boxes
        width = config.rpn_pre_nms_top_n_eval
        boxes, scores = [], []
        for level, size, stride, logits, deltas in zip(
            features, config.anchor_sizes, STRIDES_PX, *self.model.rpn.head(features), strict=True
        ):
            anchors = make_level_anchors(
                level.shape[2], level.shape[3], level.device, size_px=size, stride_px=stride, legacy=legacy
            )
            # Padded, because a level may have fewer anchors than proposals.
            level_logits = F.pad(logits.permute(0, 2, 3, 1).flatten(1).float(), (0, width), value=-torch.inf)
            level_deltas = F.pad(deltas.permute(0, 2, 3, 1).reshape(level.shape[0], -1, 4).float(), (0, 0, 0, width))
            top, index = level_logits.topk(width, dim=1)
            decoded = box_coder.decode(
                level_deltas.gather(1, index[..., None].expand(-1, -1, 4)),
                F.pad(anchors, (0, 0, 0, width))[index],
                legacy=legacy,
            )
            boxes.append(box_coder.clip(decoded, sizes_hw[:, None], legacy=legacy))
            scores.append(top)
        boxes_xyxy, score = torch.stack(boxes, dim=1), torch.stack(scores, dim=1)  # (B, levels, width)
        valid = score > -torch.inf
        if not legacy:
            valid = valid & (box_coder.widths_heights(boxes_xyxy, legacy=legacy) >= MIN_PROPOSAL_PX).all(dim=-1)
        keep = nms_keep_mask(box_coder.to_exclusive(boxes_xyxy, legacy=legacy), valid, config.rpn_nms_threshold)
        score, order = stable_topk(
            score.masked_fill(~keep, -torch.inf).flatten(1), min(config.rpn_post_nms_top_n_eval, 5 * width)
        )
        return boxes_xyxy.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, 4)), score > -torch.inf

    def select_detections(
        self, logits: Tensor, deltas: Tensor, proposals: Tensor, valid: Tensor, sizes_hw: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best detections, from logits (B, P, K) and deltas (B, P, K, 4): boxes, labels and scores."""
        config, legacy = self.config, self.config.legacy_boxes
        scores = logits.softmax(dim=2)[..., 1:].transpose(1, 2)  # (B, K - 1, P)
        boxes = box_coder.decode(
            deltas[:, :, 1:].transpose(1, 2), proposals[:, None], box_coder.BOX_HEAD_WEIGHTS, legacy=legacy
        )
        boxes = box_coder.clip(boxes, sizes_hw[:, None, None], legacy=legacy)
        candidate = (scores > config.score_threshold) & valid[:, None]
        if not legacy:
            candidate = candidate & (box_coder.widths_heights(boxes, legacy=legacy) >= MIN_DETECTION_PX).all(dim=-1)
        labels = torch.arange(1, logits.shape[2], device=logits.device)[None, :, None].expand_as(scores)
        boxes, labels = boxes.flatten(1, 2), labels.flatten(1)
        top, index = select_best(
            box_coder.to_exclusive(boxes, legacy=legacy),
            torch.where(candidate, scores, 0.0).flatten(1),
            labels,
            config.nms_threshold,
            config.max_detections,
        )
        is_kept = top > 0
        top_boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
        return top_boxes * is_kept[..., None], labels.gather(1, index) * is_kept, top
