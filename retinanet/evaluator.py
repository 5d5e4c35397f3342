"""Evaluator of RetinaNet."""

import torch
from torch import Tensor, nn

from detection.evaluation.box_evaluator import BoxEvaluator
from detection.nn.detections import Detections
from detection.runtime.distributed import DistContext
from retinanet.anchors import make_anchors
from retinanet.config import Config
from retinanet.data import EvalBatch
from retinanet.model import HeadOutputs
from retinanet.postprocess import detect
from retinanet.resize import normalize_and_resize


class RetinaNetEvaluator(BoxEvaluator):
    """Evaluator of RetinaNet, whose boxes are in pixels of the resized images."""

    def __init__(self, config: Config, ranks: DistContext):
        super().__init__(ranks)
        self.config = config

    def predict(self, model: nn.Module, batch: EvalBatch) -> Detections:
        """Return the detections in a batch on the device."""
        with torch.autocast(self.ranks.device.type, enabled=False):
            images = normalize_and_resize(batch.images, batch.sizes_hw, None, self.config.image_size)
        return self.detect(model(images))

    def detect(self, outputs: HeadOutputs) -> Detections:
        """Return the detections of the network's outputs."""
        config, size = self.config, self.config.image_size
        return detect(
            outputs,
            make_anchors(size, size, self.ranks.device, config.anchor_sizes),
            (size, size),
            score_threshold=config.score_threshold,
            nms_threshold=config.nms_threshold,
            pre_nms_top_n=config.pre_nms_top_n,
            max_detections=config.max_detections,
        )

    def scales_wh(self, batch: EvalBatch) -> Tensor:
        """Return the original over the resized sizes (B, 2)."""
        return batch.sizes_hw.flip(1) / self.config.image_size
