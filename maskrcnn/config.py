"""The settings of Mask R-CNN: what the benchmark fixes, and what a system chooses."""

from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from detection.config import STRICT, setting
from detection.run_config import EvalEpochs, RunConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config(RunConfig):
    """Train Mask R-CNN until its box and mask mAP reach their targets."""

    benchmark: ClassVar[str] = "maskrcnn"

    weight_decay: float = setting(1e-4, ge=0, le=1, help="on all weights but biases (MLPerf: 1e-4)")
    epochs: int = setting(20, ge=1, le=10_000, unit="epochs", help="give up after this many")
    eval_epochs: EvalEpochs = setting(tuple(range(1, 21)), unit="epochs", help="evaluated (MLPerf: each)")
    num_classes: int = setting(0, ge=0, help="categories and the background; 0 is as many as there are")
    min_image_size: int = setting(800, ge=32, le=8192, unit="pixels", help="of the short side, once resized")
    max_image_size: int = setting(1333, ge=32, le=8192, unit="pixels", help="of the long side, at most")
    flip: bool = setting(True, help="mirror every other training image, by chance")
    aspect_groups: bool = setting(True, help="batches of wide or of high images, so that they need little padding")
    metric: Literal["auto", "hotcoco", "pycocotools"] = setting(
        "auto", help="what computes the mAP; auto: hotcoco if it is installed; pycocotools confirms the last figures"
    )
