"""Evaluator of SSD300."""

from torch import Tensor, nn

from detection.evaluation.box_evaluator import BoxEvaluator
from detection.nn.detections import Detections
from detection.runtime.distributed import DistContext
from ssd import augment
from ssd.anchors import make_anchors
from ssd.config import Config
from ssd.data import EvalBatch
from ssd.postprocess import detect


class SSDEvaluator(BoxEvaluator):
    """Evaluator of SSD300, whose boxes are normalized."""

    def __init__(self, config: Config, ranks: DistContext):
        super().__init__(ranks)
        self.config = config

    def predict(self, model: nn.Module, batch: EvalBatch) -> Detections:
        """Return the detections in a batch on the device."""
        deltas, logits = model(augment.normalize(augment.to_float(batch.images)))
        return detect(
            deltas,
            logits,
            make_anchors(self.ranks.device),
            score_threshold=self.config.score_threshold,
            nms_threshold=self.config.nms_threshold,
            max_detections=self.config.max_detections,
        )

    def scales_wh(self, batch: EvalBatch) -> Tensor:
        """Return the sizes (B, 2) of the original images."""
        return batch.sizes_wh
