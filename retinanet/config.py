"""Settings of RetinaNet, and values derived from them."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from detection.config import run_config
from detection.config.run_config import OPEN_IMAGES, EvalEpochs, RunConfig
from detection.config.settings import STRICT, AscendingInts, ResolvedSettings, setting

PREFIX = "RETINANET_"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config(RunConfig):
    """Train RetinaNet until its box mAP reaches the target.

    Exit status: 0 if the target is reached, 3 if it is not, 2 on an error in settings or data, 1 on a crash.
    """

    benchmark: ClassVar[str] = "retinanet"
    torchvision_boxes: ClassVar[bool] = True

    dataset: str = setting(
        OPEN_IMAGES,
        pattern=r"^[\w.-]+$",
        help="name of the data set in the log; toy and synthetic_coco are generated if missing; "
        "custom is the default with --train-images",
    )
    ruleset: str = setting("5.1.0", help="MLPerf training ruleset of the log (2.0.0 to 5.1.0)")
    weight_decay: float = setting(0.0, ge=0, le=1, help="weight decay (MLPerf: 0)")
    freeze_batch_norm: bool = setting(
        True, help="use the running statistics of batch norm and do not train its weights and biases (MLPerf: yes)"
    )
    epochs: int = setting(8, ge=1, le=10_000, unit="epochs", help="maximum number of epochs")
    eval_epochs: EvalEpochs = setting(
        tuple(range(1, 9)),
        unit="epochs",
        help='evaluate after these, as 1,2 or "every 1", and after the last (MLPerf: every epoch)',
    )

    optimizer: Literal["sgd", "adam", "adamw"] = setting(
        "adam", help="adamw: Adam with decoupled weight decay; sgd: with --momentum (MLPerf: adam)"
    )
    base_lr: float = setting(
        1e-4, gt=0, le=1, heading="Training", help="learning rate after warm-up, for any batch size (MLPerf: any)"
    )
    warmup_epochs: float = setting(
        1.0, ge=0, le=1000, unit="epochs", help="linear warm-up (MLPerf closed: a whole number)"
    )
    warmup_factor: float = setting(
        1e-3, ge=0, le=1, help="fraction of the learning rate at which warm-up starts (MLPerf: any)"
    )
    backbone: Literal["resnet18", "resnet34", "resnet50", "resnext50_32x4d", "resnext101_32x8d"] = setting(
        "resnext50_32x4d", help="torchvision's network below the feature pyramid (MLPerf: resnext50_32x4d)"
    )
    freeze_at: int = setting(1, ge=0, le=4, help="freeze the stem and this many stages; 0: none (MLPerf: 1)")
    pyramid_channels: int = setting(
        256, ge=8, le=1024, help="channels of each level of the feature pyramid and of the heads (MLPerf: 256)"
    )
    head_init_std: float = setting(
        0.01,
        gt=0,
        le=1,
        help="standard deviation of the initial weights of the heads' hidden convolutions; a higher one, as "
        "sqrt(2 / (9 * channels)), learns faster from scratch (MLPerf: 0.01)",
    )
    image_size: int = setting(
        800, ge=128, le=4096, unit="pixels", help="both sides of the resized images, without keeping the aspect ratio"
    )
    anchor_sizes: AscendingInts = setting(
        (32, 64, 128, 256, 512), unit="pixels", help="smallest of the three anchor sizes of P3 to P7"
    )
    background_images: Literal["drop", "keep"] = setting(
        "keep", help="training images without boxes; keep: train on them as background, as the reference"
    )
    train_crowds: bool = setting(
        True, help="train boxes of groups (iscrowd, IsGroupOf) like other boxes; evaluation ignores them (MLPerf: yes)"
    )
    flip: bool = setting(True, help="flip training images horizontally with probability 0.5")

    target: float = setting(
        0.34, ge=0, lt=1, unit="box mAP", heading="Evaluation", help="stop when reached (MLPerf: 0.34)"
    )
    nms_threshold: float = setting(
        0.5, gt=0, le=1, unit="IoU", help="suppress detections of a class that overlap a better one by more"
    )
    score_threshold: float = setting(0.05, ge=0, lt=1, help="drop detections up to this score")
    pre_nms_top_n: int = setting(1000, ge=1, unit="per level", help="highest-scoring detections before NMS")
    max_detections: int = setting(300, ge=1, unit="per image", help="highest-scoring detections kept for the metric")

    @model_validator(mode="after")
    def _check_model_settings(self) -> Self:
        if len(self.anchor_sizes) != 5:
            raise ValueError(f"anchor_sizes should have 5 values, one per level, not {len(self.anchor_sizes)}")
        return self

    @property
    def backbone_name(self) -> str:
        """Backbone as torchvision calls it."""
        return self.backbone

    @property
    def network_name(self) -> str:
        """Name of the network, with its backbone."""
        return f"retinanet-{self.backbone}-fpn"

    @property
    def num_outputs(self) -> int:
        """Class outputs of the network, which has none for the background: output k is label k + 1."""
        return self.num_classes - 1

    def unrounded_peak_lr(self, world_size: int) -> float:
        """Return the learning rate after warm-up."""
        return self.base_lr

    def peak_lr(self, world_size: int) -> float:
        """Return the learning rate after warm-up. It does not scale with the batch, as in the reference."""
        return self.base_lr

    def hyperparameters(self, world_size: int) -> dict[str, object]:
        """Return the values that MLPerf's rules constrain, by the keys of its log."""
        return {
            "global_batch_size": self.global_batch_size(world_size),
            "gradient_accumulation_steps": self.grad_accum_steps,
            "opt_name": self.optimizer,
            "opt_base_learning_rate": self.base_lr,
            "opt_weight_decay": self.weight_decay,
            "opt_learning_rate_warmup_epochs": self.warmup_epochs,
            "opt_learning_rate_warmup_factor": self.warmup_factor,
        }


def load(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> ResolvedSettings[Config]:
    """Resolve the settings from flags and the environment. Raise one InputError with all errors."""
    return run_config.load(Config, PREFIX, argv, environ)
