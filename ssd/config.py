"""The settings of SSD300: what the benchmark fixes, what a system chooses, and what follows from both."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ValidationInfo, model_validator
from pydantic.dataclasses import dataclass

from detection.config import STRICT, Numbers, Resolved, resolve, setting

PREFIX = "SSD_"


def _every(value: Any, info: ValidationInfo) -> Any:
    match = re.fullmatch(r"every[ -]?(\d+)", value) if isinstance(value, str) else None
    if match is None:
        return value
    interval = int(match[1])
    if interval < 1:
        raise ValueError("an interval of epochs is at least 1")
    return tuple(range(interval, info.data.get("epochs", 0) + 1, interval)) or (interval,)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """Train SSD300 with ResNet-34 until its box mAP reaches the target.

    Exit status: 0 target reached, 1 crash, 2 bad settings or data, 3 epochs used up below the target.
    """

    batch_size: int = setting(
        32,
        ge=1,
        le=65536,
        heading="Recipe",
        unit="images per accelerator and optimiser step",
        help="the learning rate follows it",
    )
    accumulation_steps: int = setting(
        1,
        ge=1,
        le=4096,
        help="parts that a batch is computed in, one after the other; divides the batch size",
    )
    base_lr: float = setting(2.5e-3, gt=0, le=1, unit="per 32 images", help="learning rate after warm-up")
    lr_multiple: float = setting(
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
    decay_epochs: Numbers = setting(
        (44, 55), unit="epochs", help="after each, the learning rate falls (MLPerf: [40, 50]·(1 + k/10))"
    )
    decay_factor: float = setting(0.1, gt=0, le=1, help="the learning rate is multiplied by this (MLPerf: .1)")
    momentum: float = setting(0.9, ge=0, lt=1, help="of SGD (MLPerf: .9)")
    weight_decay: float = setting(5e-4, ge=0, le=1, help="on all parameters (MLPerf: any)")
    freeze_batch_norm: bool = setting(
        False, help="use batch norm's running statistics and train neither its weights nor its biases"
    )
    max_samples: int = setting(
        1, ge=1, le=1000, help="tries of the IoU crop before another option is drawn (MLPerf: 1 or 50)"
    )
    crop: bool = setting(True, help="IoU crop of training images")
    flip: bool = setting(True, help="mirror every second training image")
    jitter: bool = setting(True, help="colour jitter of training images")
    seed: int | None = setting(None, ge=0, lt=2**32, help="of everything random; none takes one from the system")

    epochs: int = setting(80, ge=1, le=10_000, heading="Goal", unit="epochs", help="give up after this many")
    eval_epochs: Annotated[Numbers, BeforeValidator(_every)] = setting(
        (40, 50, 55, 60, 65, 70, 75, 80),
        unit="epochs",
        help='evaluated, as 40,50 or "every 5", and the last (MLPerf: these in 0.7.0, every 5 from 1.0.0)',
    )
    target: float = setting(0.23, ge=0, lt=1, unit="box mAP", help="stop when reached (MLPerf: .23)")
    metric: Literal["pycocotools"] = setting("pycocotools", help="what computes the mAP")
    nms_iou: float = setting(0.5, gt=0, le=1, unit="IoU", help="detections of a class that overlap as much are one")
    score_threshold: float = setting(0.05, ge=0, lt=1, help="detections below are dropped")
    max_detections: int = setting(200, ge=1, le=8732, unit="per image", help="kept for the metric, the best first")

    data_dir: Path = setting(Path("data/coco"), env="DATADIR", heading="Data", help="folder in the layout of COCO 2017")
    dataset: str = setting(
        "coco2017",
        pattern=r"^[\w.-]+$",
        help="what the folder holds, for the log; toy is drawn where it is absent",
    )
    num_classes: int = setting(81, ge=2, le=10_000, help="categories and the background")
    allow_missing: bool = setting(False, help="train without the images that the folder lacks")
    backbone: str = setting(
        "",
        help="ImageNet weights of ResNet-34, .pth or .npz (get_resnet34_backbone.sh); empty is random",
    )
    num_workers: int = setting(
        4, ge=0, le=256, unit="processes per rank", help="decode images; 0 decodes in the rank itself"
    )

    device: str = setting(
        "auto",
        pattern=r"^[a-z]+(:\d+)?$",
        heading="Machine",
        help="auto, cpu, cuda, xpu ...; auto takes the accelerator there is",
    )
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = setting(
        "auto", help="auto: bf16 where the device is fast in it, else fp16 with loss scaling, else fp32"
    )
    sgd: Literal["torch", "apex"] = setting("torch", help="whose fused optimiser kernel; apex must be installed by you")
    channels_last: bool = setting(True, help="memory layout of images and weights")
    eval_batch_size: int = setting(32, ge=1, le=65536, unit="images per accelerator", help="of evaluation")

    log_dir: Path = setting(Path("results"), env="LOGDIR", heading="Log", help="run folders are made here")
    run_dir: str = setting("", env="RUN_DIR", help="this run's folder; empty makes log_dir/system/ssd/start")
    experiment: int = setting(0, ge=0, le=9999, env="EXPERIMENT", help="the log is result_<experiment>.txt")
    log_every: int = setting(20, ge=1, le=1_000_000, unit="steps", help="between lines of loss and throughput")
    system: str = setting("toy", env="DGXSYSTEM", pattern=r"^[\w.-]+$", help="name of the machine")
    ruleset: Literal["0.7.0", "1.0.0", "1.1.0"] = setting("1.1.0", help="of MLPerf training, for the log and its check")
    division: Literal["closed", "open"] = setting(
        "closed", help="open where data, model or recipe differ from MLPerf's"
    )
    org: str = setting("unknown", min_length=1, pattern=r"^[^,\n]+$", help="who runs it")
    platform: str = setting("", help="what it runs on; empty says nodes × system")
    status: Literal["cloud", "onprem", "preview", "research"] = setting("onprem", help="availability of the machine")
    caches_cleared: bool = setting(False, env="CACHES_CLEARED", help="./run_and_time.sh dropped the system's caches")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        mistakes = []
        if self.batch_size % self.accumulation_steps:
            mistakes.append(f"accumulation_steps {self.accumulation_steps} should divide batch_size {self.batch_size}")
        for name in ("decay_epochs", "eval_epochs"):
            epochs = getattr(self, name)
            if any(later <= earlier for earlier, later in itertools.pairwise(epochs)):
                mistakes.append(f"{name} {','.join(map(str, epochs))} should ascend")
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    def global_batch_size(self, world_size: int) -> int:
        """Images per optimiser step on all ranks together."""
        return self.batch_size * world_size

    def peak_lr(self, world_size: int) -> float:
        """Learning rate after warm-up: linear in the global batch, then rounded where the recipe says so."""
        lr = self.base_lr * self.global_batch_size(world_size) / 32
        if not self.lr_multiple:
            return lr
        return round(max(1, round(lr / self.lr_multiple)) * self.lr_multiple, 12)

    def blocks(self) -> list[range]:
        """Epochs between evaluations, from 1: range(1, 41), range(41, 51), ...; the last ends at `epochs`."""
        ends = [epoch for epoch in self.eval_epochs if epoch < self.epochs] + [self.epochs]
        starts = [1] + [end + 1 for end in ends[:-1]]
        return [range(start, end + 1) for start, end in zip(starts, ends, strict=True)]

    def hyperparameters(self, world_size: int) -> dict[str, object]:
        """What MLPerf's rules are about, under the names of its log keys."""
        return {
            "global_batch_size": self.global_batch_size(world_size),
            "gradient_accumulation_steps": self.accumulation_steps,
            "model_bn_span": self.batch_size // self.accumulation_steps,
            "max_samples": self.max_samples,
            "opt_base_learning_rate": self.peak_lr(world_size),
            "opt_weight_decay": self.weight_decay,
            "opt_learning_rate_warmup_steps": self.warmup_steps,
            "opt_learning_rate_warmup_factor": self.warmup_factor,
            "opt_learning_rate_decay_boundary_epochs": list(self.decay_epochs),
        }

    def submission_platform(self, nodes: int) -> str:
        """Name of what the run is on, such as 1xDGX1."""
        return self.platform or f"{nodes}x{self.system}"

    def run_folder(self, start: str) -> Path:
        """Folder of a run that began at `start` (YYYY-mm-dd_HH-MM-SS), if none was named."""
        return Path(self.run_dir) if self.run_dir else self.log_dir / self.system / "ssd" / start


def load(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> Resolved[Config]:
    """Resolve the settings from flags and the environment; raises InputError with every mistake."""
    return resolve(Config, PREFIX, argv, environ, usage="./run_and_time.sh [--help] [--dry-run] [--name value ...]")
