"""Settings of Mask R-CNN, and values derived from them."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from detection.config import run_config
from detection.config.run_config import EvalEpochs, RunConfig, round_to_multiple
from detection.config.settings import STRICT, AscendingInts, InputError, ResolvedSettings, setting

PREFIX = "MASKRCNN_"

RoiAlignMethod = Literal["auto", "torchvision", "gather"]
WarmupMethod = Literal["linear", "mlperf_linear"]

InputFormat = Literal["caffe-bgr", "imagenet-rgb"]
"""Pixel format that the backbone's weights expect: BGR 0-255 minus the mean, or RGB of mean 0 and variance 1."""

# Settings in which torchvision's model differs from the reference, in their order below.
TORCHVISION_PRESET = {
    "lr_schedule_first": "false",
    "stride_in_1x1": "false",
    "input_format": "imagenet-rgb",
    "batch_norm_eps": "1e-5",
    "legacy_boxes": "false",
    "drop_straddling": "false",
    "rpn_post_nms_top_n_per_image": "2000",
    "proposals_per_batch": "false",
    "box_smooth_l1_beta": "0.1111111111111111",
    "zero_mask_biases": "false",
    "mask_targets": "roi-align",
    "weight_decay_on_bias_and_norm": "true",
    "bias_lr_factor": "1",
}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config(RunConfig):
    """Train Mask R-CNN until its box and mask mAP both reach their targets.

    Exit status: 0 if they do, 3 if not within all epochs, 2 on an error in settings or data, 1 on a crash.
    """

    benchmark: ClassVar[str] = "maskrcnn"

    weight_decay: float = setting(1e-4, ge=0, le=1, help="weight decay of all weights except biases (MLPerf: 1e-4)")
    weight_decay_on_bias_and_norm: bool = setting(
        False, formerly="decay_biases", help="apply weight decay to biases, too (MLPerf Mask R-CNN: no)"
    )
    bias_lr_factor: float = setting(2.0, gt=0, le=10, help="learning rate factor of biases (MLPerf Mask R-CNN: 2)")
    freeze_batch_norm: bool = setting(
        True, help="use the running statistics of batch norm and do not train its weights and biases (MLPerf: yes)"
    )
    batch_size: int = setting(
        4,
        ge=1,
        le=65536,
        unit="images per accelerator and optimizer step",
        help="batch size; the learning rate scales with it",
    )
    eval_batch_size: int = setting(4, ge=1, le=65536, unit="images per accelerator", help="batch size of evaluation")
    epochs: int = setting(20, ge=1, le=10_000, unit="epochs", help="maximum number of epochs")
    eval_epochs: EvalEpochs = setting(
        tuple(range(1, 21)),
        unit="epochs",
        help='evaluate after these, as 1,2 or "every 1", and after the last (MLPerf: every epoch)',
    )

    ruleset: str = setting("3.1.0", help="MLPerf training ruleset of the log (0.7.0 to 3.1.0)")
    base_lr: float = setting(
        0.02, gt=0, le=1, unit="per 16 images", heading="Training", help="learning rate after warm-up"
    )
    lr_round_to: float = setting(
        0.0,
        ge=0,
        le=1,
        formerly="lr_multiple",
        help="round the peak learning rate to a multiple of this (MLPerf closed: 0.02); 0: no rounding",
    )
    warmup_steps: int = setting(625, ge=0, le=1_000_000, unit="steps", help="linear warm-up (MLPerf: any number)")
    warmup_method: WarmupMethod = setting(
        "linear",
        help="linear: start at warmup_factor times the learning rate; mlperf_linear: add warmup_factor to it per step",
    )
    warmup_factor: float = setting(
        1e-4, gt=0, le=1, help="fraction of the learning rate at which warm-up starts (mlperf_linear: rate per step)"
    )
    lr_schedule_first: bool = setting(
        True, help="advance the schedule before each update, as the reference: update s, from 0, has the rate of s + 1"
    )
    lr_decay_images: AscendingInts = setting(
        (1_152_000, 1_536_000),
        unit="images",
        formerly="decay_images",
        help="decay the learning rate after this many training images (MLPerf: (960,000, 1,280,000)·(1 + k/10))",
    )
    lr_decay_factor: float = setting(
        0.1, gt=0, le=1, formerly="decay_factor", help="factor of each learning rate decay (MLPerf: 0.1)"
    )
    variant: Literal["reference", "torchvision"] = setting(
        "reference", help="torchvision: use the settings of its model as defaults"
    )
    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = setting(
        "resnet50", formerly="trunk", help="torchvision's ResNet below the feature pyramid (MLPerf: resnet50)"
    )
    stride_in_1x1: bool = setting(
        True,
        formerly="trunk_stride",
        help="stride of a bottleneck in its first 1x1 convolution, as MSRA's weights; no: in the 3x3, as torchvision",
    )
    freeze_at: int = setting(
        1,
        ge=0,
        le=4,
        formerly="frozen_stages",
        help="freeze the stem and this many stages; 1: stage 2 of the paper; 0: none",
    )
    input_format: InputFormat = setting(
        "caffe-bgr",
        formerly="pixels",
        help="input of the pretrained backbone: BGR in [0, 255], or RGB divided by its standard deviation",
    )
    batch_norm_eps: float = setting(0.0, ge=0, lt=1, help="added to the variance; 0: already part of the weights")
    legacy_boxes: bool = setting(True, help="boxes include their last pixel: width is x1 - x0 + 1")
    anchor_sizes: AscendingInts = setting((32, 64, 128, 256, 512), unit="pixels", help="anchor sizes of P2 to P6")
    drop_straddling: bool = setting(True, help="do not train anchors that cross the image border")
    rpn_pre_nms_top_n: int = setting(
        2000, ge=1, unit="per level", formerly="rpn_before_nms", help="proposals before NMS, in training"
    )
    rpn_pre_nms_top_n_eval: int = setting(
        1000, ge=1, unit="per level", formerly="rpn_before_nms_eval", help="proposals before NMS, in evaluation"
    )
    rpn_post_nms_top_n_per_image: int = setting(
        1000,
        ge=1,
        unit="per image",
        formerly="rpn_after_nms rpn_post_nms_top_n",
        help="proposals after NMS, in training (MLPerf: 1000)",
    )
    rpn_post_nms_top_n_eval: int = setting(
        1000, ge=1, unit="per image", formerly="rpn_after_nms_eval", help="proposals after NMS, in evaluation"
    )
    proposals_per_batch: bool = setting(
        True, help="keep the best proposals of a rank's whole batch, as many as for its images; no: of each image"
    )
    rpn_nms_threshold: float = setting(
        0.7, gt=0, le=1, unit="IoU", formerly="rpn_nms_iou", help="suppress proposals that overlap a better one by more"
    )
    rpn_batch_size_per_image: int = setting(
        256, ge=1, unit="per image", formerly="rpn_samples", help="anchors sampled for training"
    )
    rpn_positive_fraction: float = setting(
        0.5, gt=0, le=1, formerly="rpn_positive_share", help="maximum fraction of positives among them"
    )
    box_batch_size_per_image: int = setting(
        512, ge=1, unit="per image", formerly="box_samples", help="ROIs sampled for training"
    )
    box_positive_fraction: float = setting(
        0.25, gt=0, le=1, formerly="box_positive_share", help="maximum fraction of positives among them"
    )
    box_smooth_l1_beta: float = setting(
        1.0, gt=0, le=10, formerly="box_beta", help="transition of the box head's smooth L1 loss"
    )
    zero_mask_biases: bool = setting(
        True, help="start the last two layers of the mask head with biases of 0; no: random, as torchvision"
    )
    mask_targets: Literal["polygon", "roi-align"] = setting(
        "polygon",
        formerly="soft_masks",
        help="polygon: rasterize polygons within each ROI; roi-align: sample full-size masks, as torchvision",
    )
    roi_align: RoiAlignMethod = setting(
        "auto",
        help="torchvision: its kernel; gather: torch's embedding_bag, on any device; auto: torchvision except on a CPU",
    )
    min_image_size: int = setting(800, ge=32, le=8192, unit="pixels", help="short side after resizing")
    max_image_size: int = setting(1333, ge=32, le=8192, unit="pixels", help="maximum long side after resizing")
    flip: bool = setting(True, help="flip training images horizontally with probability 0.5")
    group_by_aspect_ratio: bool = setting(
        True, formerly="aspect_groups", help="batch landscape and portrait images separately, to reduce padding"
    )

    target: float = setting(
        0.377, ge=0, lt=1, unit="box mAP", heading="Evaluation", help="stop when both targets are reached"
    )
    mask_target: float = setting(0.339, ge=0, lt=1, unit="mask mAP", help="stop when both targets are reached")
    nms_threshold: float = setting(
        0.5,
        gt=0,
        le=1,
        unit="IoU",
        formerly="nms_iou",
        help="suppress detections of a class that overlap a better one by more",
    )
    score_threshold: float = setting(0.05, ge=0, lt=1, help="drop detections below this score")
    max_detections: int = setting(100, ge=1, unit="per image", help="highest-scoring detections kept for the metric")

    @model_validator(mode="after")
    def _check_model_settings(self) -> Self:
        if len(self.anchor_sizes) != 5:
            raise ValueError(f"anchor_sizes should have 5 values, one per level, not {len(self.anchor_sizes)}")
        if self.max_image_size < self.min_image_size:
            raise ValueError(
                f"max_image_size {self.max_image_size} should not be below min_image_size {self.min_image_size}"
            )
        if not self.freeze_batch_norm and self.batch_norm_eps == 0:
            raise ValueError("trained batch norm needs a positive batch_norm_eps, such as 1e-5")
        return self

    @property
    def backbone_name(self) -> str:
        """Name of the ResNet in torchvision."""
        return self.backbone

    @property
    def network_name(self) -> str:
        """Name of the network, with the variant unless it is the reference's."""
        backbone = self.backbone.replace("resnet", "r")
        return f"maskrcnn-{backbone}-fpn" + ("" if self.variant == "reference" else f" ({self.variant})")

    def unrounded_peak_lr(self, world_size: int) -> float:
        """Return the learning rate after warm-up before rounding, linear in the global batch size."""
        return round(self.base_lr * self.global_batch_size(world_size) / 16, 12)

    def peak_lr(self, world_size: int) -> float:
        """Return the learning rate after warm-up, rounded to a multiple of `lr_round_to`."""
        return round_to_multiple(self.unrounded_peak_lr(world_size), self.lr_round_to)

    def check_world_size(self, world_size: int) -> None:
        """Raise InputError if the settings do not fit this number of ranks."""
        super().check_world_size(world_size)
        peak, missing_steps = self.peak_lr(world_size), self.warmup_steps - self.lr_schedule_first
        if self.warmup_method == "mlperf_linear" and missing_steps * self.warmup_factor > peak * (1 + 1e-9):
            raise InputError(
                f"--warmup-factor {self.warmup_factor:g}: {self.warmup_steps} steps of it exceed the learning rate "
                f"{peak:g}, so training would start below 0. Pass {peak / self.warmup_steps:.6g} to start at 0."
            )

    def decay_steps(self, world_size: int) -> tuple[int, ...]:
        """Return the steps after which the learning rate decays."""
        return tuple(round(images / self.global_batch_size(world_size)) for images in self.lr_decay_images)

    def hyperparameters(self, world_size: int) -> dict[str, object]:
        """Return the values that MLPerf's rules constrain, by the keys of its log."""
        return {
            "global_batch_size": self.global_batch_size(world_size),
            "gradient_accumulation_steps": self.grad_accum_steps,
            "opt_base_learning_rate": self.peak_lr(world_size),
            "opt_learning_rate_warmup_steps": self.warmup_steps,
            "opt_learning_rate_warmup_factor": self.warmup_factor,
            "opt_learning_rate_decay_factor": self.lr_decay_factor,
            "opt_learning_rate_decay_steps": list(self.decay_steps(world_size)),
            "num_image_candidates": self.rpn_post_nms_top_n_per_image * self.batch_size,
            "min_image_size": self.min_image_size,
            "max_image_size": self.max_image_size,
        }


def load(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> ResolvedSettings[Config]:
    """Resolve the settings from flags and the environment. Raise one InputError with all errors.

    `variant torchvision` sets the defaults of `TORCHVISION_PRESET`.
    """
    return run_config.load(
        Config,
        PREFIX,
        argv,
        environ,
        presets={"variant": {"torchvision": TORCHVISION_PRESET}},
    )
