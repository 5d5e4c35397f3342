"""The settings of Mask R-CNN: what the benchmark fixes, what a system chooses, and what follows from both."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from detection.config import run_config
from detection.config.run_config import EvalEpochs, RunConfig, to_multiple
from detection.config.settings import STRICT, Numbers, Resolved, setting

PREFIX = "MASKRCNN_"

# What torchvision's model does otherwise than the reference, in the order of the settings.
TORCHVISION = {
    "stride_in_1x1": "false",
    "input_format": "imagenet-rgb",
    "batch_norm_eps": "1e-5",
    "legacy_boxes": "false",
    "drop_straddling": "false",
    "proposals_per_batch": "false",
    "rpn_pre_nms_top_n_eval": "1000",
    "box_smooth_l1_beta": "0.1111111111111111",
    "mask_targets": "roi-align",
    "weight_decay_on_bias_and_norm": "true",
    "bias_lr_factor": "1",
}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config(RunConfig):
    """Train Mask R-CNN until its box and mask mAP both reach their targets.

    Exits with 0 where they do, 3 where the epochs are used up, 2 on a mistake in settings or data, 1 on a crash.
    """

    benchmark: ClassVar[str] = "maskrcnn"

    weight_decay: float = setting(1e-4, ge=0, le=1, help="on all weights but biases (MLPerf: 1e-4)")
    weight_decay_on_bias_and_norm: bool = setting(False, help="weight decay on biases, too (MLPerf Mask R-CNN: no)")
    bias_lr_factor: float = setting(2.0, gt=0, le=10, help="biases learn so much faster (MLPerf Mask R-CNN: 2)")
    freeze_batch_norm: bool = setting(
        True, help="use batch norm's running statistics, train neither its weights nor its biases (MLPerf: yes)"
    )
    batch_size: int = setting(
        4,
        ge=1,
        le=65536,
        unit="images per accelerator and optimiser step",
        help="the learning rate follows it",
    )
    eval_batch_size: int = setting(4, ge=1, le=65536, unit="images per accelerator", help="of evaluation")
    epochs: int = setting(20, ge=1, le=10_000, unit="epochs", help="give up after this many")
    eval_epochs: EvalEpochs = setting(
        tuple(range(1, 21)), unit="epochs", help='evaluated, as 1,2 or "every 1", and the last (MLPerf: every one)'
    )

    base_lr: float = setting(
        0.02, gt=0, le=1, unit="per 16 images", heading="Mask R-CNN: training", help="learning rate after warm-up"
    )
    lr_round_to: float = setting(
        0.0, ge=0, le=1, help="round the peak learning rate to a multiple (MLPerf closed: 0.02); 0 leaves it"
    )
    warmup_steps: int = setting(625, ge=0, le=1_000_000, unit="steps", help="linear warm-up (MLPerf: any number)")
    warmup_factor: float = setting(1e-4, gt=0, le=1, help="share of the learning rate that warm-up starts at (> 0)")
    lr_decay_images: Numbers = setting(
        (1_152_000, 1_536_000),
        unit="images",
        help="trained, after each the learning rate falls (MLPerf: (960,000, 1,280,000)·(1 + k/10))",
    )
    lr_decay_factor: float = setting(0.1, gt=0, le=1, help="the learning rate is multiplied by this (MLPerf: .1)")
    variant: Literal["reference", "torchvision"] = setting(
        "reference", help="torchvision: what its model does otherwise, each where it is not set by itself"
    )
    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = setting(
        "resnet50", help="torchvision's ResNet under the pyramid (MLPerf: resnet50)"
    )
    stride_in_1x1: bool = setting(
        True,
        help="halve the input of a bottleneck in its first 1x1 convolution, as MSRA's weights do; torchvision's: 3x3",
    )
    freeze_at: int = setting(1, ge=0, le=4, help="with the stem, not trained: 1 is stage 2 of the paper; 0: none")
    input_format: Literal["caffe-bgr", "imagenet-rgb"] = setting(
        "caffe-bgr", help="what the trunk's weights have been trained on: BGR from 0 to 255, or RGB over its deviation"
    )
    batch_norm_eps: float = setting(0.0, ge=0, lt=1, help="added to a variance: 0 where the weights have it in them")
    legacy_boxes: bool = setting(True, help="a box includes its last pixel: its width is x1 - x0 + 1")
    anchor_sizes: Numbers = setting((32, 64, 128, 256, 512), unit="pixels", help="of the anchors of P2 to P6")
    drop_straddling: bool = setting(True, help="do not train anchors that cross the border of their image")
    rpn_pre_nms_top_n: int = setting(2000, ge=1, unit="per level", help="proposals before their NMS, in training")
    rpn_pre_nms_top_n_eval: int = setting(
        2000, ge=1, unit="per level", help="proposals before their NMS, in evaluation"
    )
    rpn_post_nms_top_n: int = setting(2000, ge=1, help="proposals after their NMS, in training")
    rpn_post_nms_top_n_eval: int = setting(
        1000, ge=1, unit="per image", help="proposals after their NMS, in evaluation"
    )
    proposals_per_batch: bool = setting(True, help="in training those are of a rank's whole batch, not of an image")
    rpn_nms_threshold: float = setting(0.7, gt=0, le=1, unit="IoU", help="proposals that overlap as much are one")
    rpn_batch_size_per_image: int = setting(256, ge=1, unit="per image", help="anchors that are trained")
    rpn_positive_fraction: float = setting(0.5, gt=0, le=1, help="of those are positive, at most")
    box_batch_size_per_image: int = setting(512, ge=1, unit="per image", help="regions that are trained")
    box_positive_fraction: float = setting(0.25, gt=0, le=1, help="of those are positive, at most")
    box_smooth_l1_beta: float = setting(1.0, gt=0, le=10, help="where smooth L1 of the box head turns straight")
    mask_targets: Literal["polygon", "roi-align"] = setting(
        "polygon",
        help="polygon: rasterize the polygons within each region; roi-align: sample whole bitmaps, as torchvision",
    )
    min_image_size: int = setting(800, ge=32, le=8192, unit="pixels", help="of the short side, once resized")
    max_image_size: int = setting(1333, ge=32, le=8192, unit="pixels", help="of the long side, at most")
    flip: bool = setting(True, help="mirror every other training image, by chance")
    group_by_aspect_ratio: bool = setting(
        True, help="batches of wide or of high images, so that they need little padding"
    )

    target: float = setting(
        0.377, ge=0, lt=1, unit="box mAP", heading="Mask R-CNN: evaluation", help="stop when both are reached"
    )
    mask_target: float = setting(0.339, ge=0, lt=1, unit="mask mAP", help="stop when both are reached")
    nms_threshold: float = setting(
        0.5, gt=0, le=1, unit="IoU", help="detections of a class that overlap as much are one"
    )
    score_threshold: float = setting(0.05, ge=0, lt=1, help="detections below are dropped")
    max_detections: int = setting(100, ge=1, unit="per image", help="kept for the metric, the best first")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.anchor_sizes) != 5:
            raise ValueError(f"anchor_sizes should be five, one for each level, not {len(self.anchor_sizes)}")
        if self.max_image_size < self.min_image_size:
            raise ValueError(
                f"max_image_size {self.max_image_size} should not be below min_image_size {self.min_image_size}"
            )
        if not self.freeze_batch_norm and self.batch_norm_eps == 0:
            raise ValueError("batch norm that is trained needs a batch_norm_eps above 0, such as 1e-5")
        return self

    @property
    def trunk_name(self) -> str:
        """The ResNet that the network stands on, as torchvision calls it."""
        return self.backbone

    @property
    def network_name(self) -> str:
        """The network, with what is not the reference's."""
        trunk = self.backbone.replace("resnet", "r")
        return f"maskrcnn-{trunk}-fpn" + ("" if self.variant == "reference" else f" ({self.variant})")

    def exact_lr(self, world_size: int) -> float:
        """Learning rate after warm-up, linear in the global batch, before it is rounded to a multiple."""
        return round(self.base_lr * self.global_batch_size(world_size) / 16, 12)

    def peak_lr(self, world_size: int) -> float:
        """Learning rate after warm-up, rounded where the recipe says so."""
        return to_multiple(self.exact_lr(world_size), self.lr_round_to)

    def decay_steps(self, world_size: int) -> tuple[int, ...]:
        """Steps after which the learning rate falls."""
        return tuple(round(images / self.global_batch_size(world_size)) for images in self.lr_decay_images)

    def hyperparameters(self, world_size: int) -> dict[str, object]:
        """What MLPerf's rules are about, under the names of its log keys."""
        return {
            "global_batch_size": self.global_batch_size(world_size),
            "gradient_accumulation_steps": self.grad_accum_steps,
            "opt_base_learning_rate": self.peak_lr(world_size),
            "opt_learning_rate_warmup_steps": self.warmup_steps,
            "opt_learning_rate_warmup_factor": self.warmup_factor,
            "opt_learning_rate_decay_factor": self.lr_decay_factor,
            "opt_learning_rate_decay_steps": list(self.decay_steps(world_size)),
            "num_image_candidates": self.rpn_post_nms_top_n,
            "min_image_size": self.min_image_size,
            "max_image_size": self.max_image_size,
        }


def load(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> Resolved[Config]:
    """Resolve the settings from flags and the environment; raises InputError with every mistake.

    With `variant torchvision` its settings are the defaults.
    """
    return run_config.load(
        Config,
        PREFIX,
        argv,
        environ,
        usage="BENCHMARK=maskrcnn ./run_and_time.sh [--help] [--dry-run] [--name value ...]",
        presets={"variant": {"torchvision": TORCHVISION}},
    )
