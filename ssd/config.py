"""Settings of SSD300, with their defaults, limits and the values derived from them."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from detection.config import run_config
from detection.config.run_config import EvalEpochs, RunConfig, round_to_multiple
from detection.config.settings import STRICT, AscendingInts, ResolvedSettings, setting

PREFIX = "SSD_"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config(RunConfig):
    """Train SSD300 until its box mAP reaches the target.

    Exit status: 0 if the target is reached, 3 if it is not, 2 on an error in settings or data, 1 on a crash.
    """

    benchmark: ClassVar[str] = "ssd"
    reference_eval_images: ClassVar[Literal["with-boxes", "all"]] = "with-boxes"

    weight_decay: float = setting(5e-4, ge=0, le=1, help="weight decay (MLPerf: any)")
    epochs: int = setting(80, ge=1, le=10_000, unit="epochs", help="maximum number of epochs")
    eval_epochs: EvalEpochs = setting(
        (40, 50, 55, 60, 65, 70, 75, 80),
        unit="epochs",
        help='evaluate after these, as 40,50 or "every 5", and after the last (MLPerf: these in 0.7.0, '
        "every 5 from 1.0.0)",
    )

    base_lr: float = setting(
        2.5e-3, gt=0, le=1, unit="per 32 images", heading="Training", help="learning rate after warm-up"
    )
    lr_round_to: float = setting(
        0.0,
        ge=0,
        le=1,
        formerly="lr_multiple",
        help="round the peak learning rate to a multiple of this (NVIDIA's submissions: 2.5e-3); 0: no rounding",
    )
    warmup_steps: int = setting(
        300, ge=0, le=1_000_000, unit="steps", help="linear warm-up (MLPerf closed: at least 1)"
    )
    warmup_factor: float = setting(
        0.0, ge=0, le=30, help="warm-up starts at peak·(1 - 2^-factor); 0: starts at 0 (MLPerf: at least 0)"
    )
    lr_decay_epochs: AscendingInts = setting(
        (44, 55),
        unit="epochs",
        formerly="decay_epochs",
        help="decay the learning rate after each (MLPerf: [40, 50]·(1 + k/10))",
    )
    lr_decay_factor: float = setting(
        0.1, gt=0, le=1, formerly="decay_factor", help="factor of each learning rate decay (MLPerf: 0.1)"
    )
    max_samples: int = setting(
        1, ge=1, le=1000, help="attempts of the IoU crop before another option is sampled (MLPerf: 1 or 50)"
    )
    crop: bool = setting(True, help="IoU crop of training images")
    flip: Literal["none", "horizontal", "horizontal+vertical"] = setting(
        "horizontal",
        help="flip training images with probability 0.5; horizontal+vertical: in each direction, such as for cells",
    )
    jitter: bool = setting(True, help="color jitter of training images")
    network: Literal["ssd300-r34", "ssd300-r50"] = setting(
        "ssd300-r34", help="ssd300-r34: MLPerf's network; ssd300-r50: SSD300 v1.1, with batch norm in its extra blocks"
    )
    backbone: Literal["auto", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = setting(
        "auto", formerly="trunk", help="torchvision's ResNet; auto: the one in the name of the network"
    )

    target: float = setting(
        0.23, ge=0, lt=1, unit="box mAP", heading="Evaluation", help="stop when reached (MLPerf: 0.23)"
    )
    nms_threshold: float = setting(
        0.5,
        gt=0,
        le=1,
        unit="IoU",
        formerly="nms_iou",
        help="suppress detections of a class that overlap a better one this much",
    )
    score_threshold: float = setting(0.05, ge=0, lt=1, help="drop detections below this score")
    max_detections: int = setting(
        200, ge=1, le=8732, unit="per image", help="highest-scoring detections kept for the metric"
    )

    @property
    def default_backbone(self) -> str:
        """Backbone in the network's name, as torchvision calls it."""
        return self.network.replace("ssd300-r", "resnet")

    @property
    def backbone_name(self) -> str:
        """Backbone of the settings, as torchvision calls it."""
        return self.default_backbone if self.backbone == "auto" else self.backbone

    @property
    def network_name(self) -> str:
        """Name of the network, with its backbone unless that is the default one."""
        is_default = self.backbone_name == self.default_backbone
        return self.network if is_default else f"{self.network} on {self.backbone_name}"

    @property
    def extras_batch_norm(self) -> bool:
        """True if the extra blocks have batch norm."""
        return self.network == "ssd300-r50"

    def unrounded_peak_lr(self, world_size: int) -> float:
        """Return the learning rate after warm-up, linear in the global batch size, before rounding."""
        return self.base_lr * self.global_batch_size(world_size) / 32

    def peak_lr(self, world_size: int) -> float:
        """Return the learning rate after warm-up, rounded by `lr_round_to`."""
        return round_to_multiple(self.unrounded_peak_lr(world_size), self.lr_round_to)

    def hyperparameters(self, world_size: int) -> dict[str, object]:
        """Return the hyperparameters of MLPerf's rules, by log key."""
        return {
            "global_batch_size": self.global_batch_size(world_size),
            "gradient_accumulation_steps": self.grad_accum_steps,
            "model_bn_span": self.batch_size // self.grad_accum_steps * self.bn_group_size(world_size),
            "max_samples": self.max_samples,
            "opt_base_learning_rate": self.peak_lr(world_size),
            "opt_weight_decay": self.weight_decay,
            "opt_learning_rate_warmup_steps": self.warmup_steps,
            "opt_learning_rate_warmup_factor": self.warmup_factor,
            "opt_learning_rate_decay_boundary_epochs": list(self.lr_decay_epochs),
        }


def load(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> ResolvedSettings[Config]:
    """Resolve the settings from flags and the environment. Raise one InputError with all errors."""
    return run_config.load(Config, PREFIX, argv, environ)
