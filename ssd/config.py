"""The settings of SSD300: what the benchmark fixes, what a system chooses, and what follows from both."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from detection.config import run_config
from detection.config.run_config import EvalEpochs, RunConfig, to_multiple
from detection.config.settings import STRICT, Numbers, Resolved, setting

PREFIX = "SSD_"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config(RunConfig):
    """Train SSD300 until its box mAP reaches the target.

    Exits with 0 where it does, 3 where the epochs are used up, 2 on a mistake in settings or data, 1 on a crash.
    """

    benchmark: ClassVar[str] = "ssd"

    weight_decay: float = setting(5e-4, ge=0, le=1, help="on all parameters (MLPerf: any)")
    epochs: int = setting(80, ge=1, le=10_000, unit="epochs", help="give up after this many")
    eval_epochs: EvalEpochs = setting(
        (40, 50, 55, 60, 65, 70, 75, 80),
        unit="epochs",
        help='evaluated, as 40,50 or "every 5", and the last (MLPerf: these in 0.7.0, every 5 from 1.0.0)',
    )

    base_lr: float = setting(
        2.5e-3, gt=0, le=1, unit="per 32 images", heading="SSD: training", help="learning rate after warm-up"
    )
    lr_round_to: float = setting(
        0.0,
        ge=0,
        le=1,
        help="round the peak learning rate to a multiple (NVIDIA's submissions: 2.5e-3); 0 leaves it",
    )
    warmup_steps: int = setting(
        300, ge=0, le=1_000_000, unit="steps", help="linear warm-up (MLPerf closed: any number from 1 up)"
    )
    warmup_factor: float = setting(
        0.0, ge=0, le=30, help="warm-up starts at peak·(1 - 2^-factor): 0 starts at 0 (MLPerf: any from 0 up)"
    )
    lr_decay_epochs: Numbers = setting(
        (44, 55), unit="epochs", help="after each, the learning rate falls (MLPerf: [40, 50]·(1 + k/10))"
    )
    lr_decay_factor: float = setting(0.1, gt=0, le=1, help="the learning rate is multiplied by this (MLPerf: .1)")
    max_samples: int = setting(
        1, ge=1, le=1000, help="tries of the IoU crop before another option is drawn (MLPerf: 1 or 50)"
    )
    crop: bool = setting(True, help="IoU crop of training images")
    flip: Literal["none", "horizontal", "horizontal+vertical"] = setting(
        "horizontal",
        help="mirror every second training image left to right; horizontal+vertical: and top to bottom, as cells allow",
    )
    jitter: bool = setting(True, help="colour jitter of training images")
    network: Literal["ssd300-r34", "ssd300-r50"] = setting(
        "ssd300-r34", help="ssd300-r34: MLPerf's; ssd300-r50: SSD300 v1.1, with batch norm in its extra blocks"
    )
    backbone: Literal["auto", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = setting(
        "auto", help="torchvision's ResNet below it; auto: the one that the network is named after"
    )

    target: float = setting(
        0.23, ge=0, lt=1, unit="box mAP", heading="SSD: evaluation", help="stop when reached (MLPerf: .23)"
    )
    nms_threshold: float = setting(
        0.5, gt=0, le=1, unit="IoU", help="detections of a class that overlap as much are one"
    )
    score_threshold: float = setting(0.05, ge=0, lt=1, help="detections below are dropped")
    max_detections: int = setting(200, ge=1, le=8732, unit="per image", help="kept for the metric, the best first")

    @property
    def named_after(self) -> str:
        """The ResNet that the network is named after, as torchvision calls it."""
        return self.network.replace("ssd300-r", "resnet")

    @property
    def trunk_name(self) -> str:
        """The ResNet that the network stands on, as torchvision calls it."""
        return self.named_after if self.backbone == "auto" else self.backbone

    @property
    def network_name(self) -> str:
        """The network, with its trunk where it is not the one that it is named after."""
        return self.network if self.trunk_name == self.named_after else f"{self.network} on {self.trunk_name}"

    @property
    def extras_batch_norm(self) -> bool:
        """Whether the extra blocks have batch norm."""
        return self.network == "ssd300-r50"

    def exact_lr(self, world_size: int) -> float:
        """Learning rate after warm-up, linear in the global batch, before it is rounded."""
        return self.base_lr * self.global_batch_size(world_size) / 32

    def peak_lr(self, world_size: int) -> float:
        """Learning rate after warm-up, rounded where the recipe says so."""
        return to_multiple(self.exact_lr(world_size), self.lr_round_to)

    def hyperparameters(self, world_size: int) -> dict[str, object]:
        """What MLPerf's rules are about, under the names of its log keys."""
        return {
            "global_batch_size": self.global_batch_size(world_size),
            "gradient_accumulation_steps": self.grad_accum_steps,
            "model_bn_span": self.batch_size // self.grad_accum_steps * self.bn_ranks(world_size),
            "max_samples": self.max_samples,
            "opt_base_learning_rate": self.peak_lr(world_size),
            "opt_weight_decay": self.weight_decay,
            "opt_learning_rate_warmup_steps": self.warmup_steps,
            "opt_learning_rate_warmup_factor": self.warmup_factor,
            "opt_learning_rate_decay_boundary_epochs": list(self.lr_decay_epochs),
        }


def load(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> Resolved[Config]:
    """Resolve the settings from flags and the environment; raises InputError with every mistake."""
    return run_config.load(
        Config, PREFIX, argv, environ, usage="./run_and_time.sh [--help] [--dry-run] [--name value ...]"
    )
