"""Settings shared by all workloads: run, data, machine and log."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, ValidationInfo, field_validator, model_validator
from pydantic.dataclasses import dataclass

from detection.config import device_names
from detection.config.settings import STRICT, AscendingInts, InputError, ResolvedSettings, resolve, setting
from detection.run_dir import latest_unfinished
from mlperf.rules import require_ruleset


def _parse_interval(value: Any, info: ValidationInfo) -> Any:
    match = re.fullmatch(r"every[ -]?(\d+)", value) if isinstance(value, str) else None
    if match is None:
        return value
    interval = int(match[1])
    if interval < 1:
        raise ValueError("an interval of epochs should be at least 1")
    return tuple(range(interval, info.data.get("epochs", 0) + 1, interval)) or (interval,)


COCO_NUM_CLASSES = 81

OPEN_IMAGES = "openimages-mlperf"
"""Name of Open Images v6 with the 264 classes of MLPerf's RetinaNet."""

KNOWN_NUM_CLASSES = {"coco2017": COCO_NUM_CLASSES, OPEN_IMAGES: 265}
"""Number of classes of a data set, with the background, where it is known without reading the annotations."""


def _reject_background_only(num_classes: int) -> int:
    if num_classes == 1:
        raise ValueError("the background is not a category. Pass 0 to count the categories of the annotations.")
    return num_classes


NumClasses = Annotated[int, AfterValidator(_reject_background_only)]
"""Number of categories plus background. 0: count the categories of the annotations."""

CUSTOM_DATA_SETTINGS = ("train_images", "train_annotations", "val_images", "val_annotations")
"""Settings that replace the data of DATADIR."""

SYNTHETIC_DATASETS = ("toy", "synthetic_coco")
"""Data sets that the program generates."""

ExifRule = Literal["auto", "ignore", "apply"]
"""Rule for the EXIF orientation of an image: see `detection.data.image_file.ImageFile`."""

EvalEpochs = Annotated[AscendingInts, BeforeValidator(_parse_interval)]
"""Epochs to evaluate after, written `40,50` or `every 5`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """Settings shared by all workloads. Each workload sets the defaults of its MLPerf rules."""

    benchmark: ClassVar[str]
    reference_eval_images: ClassVar[Literal["with-boxes", "all"]] = "all"
    """Images on which the MLPerf reference detects."""
    torchvision_boxes: ClassVar[bool] = False
    """True if the MLPerf reference prepares boxes as torchvision's training scripts do (`coco.read`)."""

    mode: Literal["train", "evaluate", "bench-train", "bench-infer"] = setting(
        "train",
        heading="Run",
        help="train: to the target, with a RESULT; evaluate: metrics of --weights; bench-*: throughput in img/s",
    )
    batch_size: int = setting(
        32,
        ge=1,
        le=65536,
        unit="images per accelerator and optimizer step",
        help="batch size; the learning rate scales with it",
    )
    grad_accum_steps: int = setting(
        1,
        ge=1,
        le=4096,
        formerly="accumulation_steps",
        help="micro-batches per batch, computed one after the other; must divide the batch size",
    )
    bn_group: int = setting(
        1, ge=0, le=65536, unit="ranks", help="group that shares batch norm statistics; must divide the ranks; 0: all"
    )
    optimizer: Literal["sgd", "adam", "adamw"] = setting(
        "sgd", help="adamw: Adam with decoupled weight decay (MLPerf: sgd, and adam for RetinaNet)"
    )
    momentum: float = setting(0.9, ge=0, lt=1, help="momentum of SGD (MLPerf: 0.9)")
    weight_decay: float
    weight_decay_on_bias_and_norm: bool = setting(
        True, formerly="decay_biases", help="apply weight decay to biases and batch norm, too (MLPerf SSD: yes)"
    )
    bias_lr_factor: float = setting(1.0, gt=0, le=10, help="learning rate factor of biases (MLPerf Mask R-CNN: 2)")
    freeze_batch_norm: bool = setting(
        False, help="use the running statistics of batch norm and do not train its weights and biases"
    )
    pretrained_backbone: str = setting(
        "", help="ImageNet weights of the backbone, .pth or .npz (get_resnet34_backbone.sh); empty: random weights"
    )
    seed: int | None = setting(None, ge=0, lt=2**32, help="random seed; none: taken from the operating system")
    epochs: int
    eval_epochs: EvalEpochs
    weights: str = setting(
        "",
        formerly="checkpoint",
        help="weights of the whole network to start from or evaluate: from this program or a public checkpoint",
    )
    eval_before_training: bool = setting(
        False, formerly="evaluate_first", help="evaluate once before training, within the measured time"
    )
    benchmark_input: Literal["both", "real", "synthetic"] = setting(
        "both", help="input of the bench modes: images of the data set, or synthetic noise already on the device"
    )
    benchmark_steps: int = setting(20, ge=1, le=1_000_000, unit="steps", help="measured steps of the bench modes")
    benchmark_warmup: int = setting(5, ge=0, le=1_000_000, unit="steps", help="unmeasured steps before them")

    data_dir: Path = setting(Path("data/coco"), env="DATADIR", heading="Data", help="folder in COCO 2017 layout")
    train_images: str = setting(
        "", help="folder of training images instead of DATADIR's; requires the next three settings"
    )
    train_annotations: str = setting("", help="file of their annotations in COCO format")
    val_images: str = setting("", help="folder of evaluation images")
    val_annotations: str = setting("", help="file of their annotations, with the same categories")
    dataset: str = setting(
        "coco2017",
        pattern=r"^[\w.-]+$",
        help="name of the data set in the log; toy and synthetic_coco are generated if missing; "
        "custom is the default with --train-images",
    )
    synthetic_images: int = setting(
        118_287,
        ge=1,
        le=1_000_000,
        env="SYNTHETIC_IMAGES",
        unit="images",
        formerly="rehearsal_images",
        help="training images of synthetic_coco; it has 5,000 evaluation images per 118,287 of them",
    )
    num_classes: NumClasses = setting(
        0, ge=0, le=10_000, help="categories plus background; 0: those of the annotations (coco2017: 81)"
    )
    skip_missing_images: bool = setting(
        False, formerly="allow_missing", help="train without images that are missing from the folder"
    )
    exif: ExifRule = setting(
        "auto",
        help="EXIF orientation of images; ignore: pixels as stored, as in COCO; apply: as displayed; auto: as "
        "displayed only where the annotated width and height are those of the rotated image",
    )
    background_images: Literal["drop", "keep"] = setting(
        "drop", help="training images without boxes; drop: as the references; keep: train on them as background"
    )
    last_batch: Literal["partial", "pad", "carry-over"] = setting(
        "partial",
        help="last global batch of an epoch; partial: the remaining images; pad: filled with the epoch's first images, "
        "which train twice; carry-over: filled with images of the next epoch, which then skips them",
    )
    num_workers: int = setting(
        4, ge=0, le=256, unit="processes per rank", help="data workers that decode images; 0: decode in the rank itself"
    )

    jpeg_decoder: Literal["cpu", "gpu"] = setting(
        "cpu",
        formerly="decoder",
        help="decoder of training images; cpu: the data workers; gpu: an NVIDIA accelerator's JPEG decoder",
    )
    image_cache: Literal["none", "host", "device"] = setting(
        "none",
        formerly="decoded_cache",
        help="memory that keeps decoded training images, filled in the first epoch: the host's or each device's",
    )
    image_cache_gib: float = setting(
        0.0,
        ge=0,
        unit="GiB",
        formerly="decoded_cache_gib",
        help="maximum size per node (host) or per device; 0: half of the host's or 3/4 of the device's free memory",
    )

    device: str = setting("auto", pattern=r"^[a-z]+(:\d+)?$", heading="Machine", help=device_names.DEVICE_HELP)
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = setting(
        "auto",
        help="auto: bf16 if the device has fast bf16, else fp16 with loss scaling, else fp32; a step that loss scaling "
        "skips still advances the learning-rate schedule, as in the references",
    )
    gradient_dtype: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", help="data type of the gradient all-reduce; bf16 and fp16 send half the bytes with less precision"
    )
    numa_binding: Literal["off", "node", "exclusive"] = setting(
        "off",
        formerly="bind",
        help="bind ranks to cores near their accelerator; node: its NUMA node; exclusive: disjoint parts of it",
    )
    compile: Literal["auto", "on", "off"] = setting(
        "auto", help="compile the network with torch.compile before the clock starts; auto: on an accelerator"
    )
    optimizer_backend: Literal["torch", "apex"] = setting(
        "torch", formerly="sgd", help="library of the fused optimizer kernel; apex must be installed separately"
    )
    channels_last: Literal["auto", "on", "off"] = setting(
        "auto",
        help="channels-last memory layout of images and weights; auto: on, except in fp32 on a CPU if batch norm "
        "trains, where its sums would be less precise",
    )
    eval_batch_size: int = setting(32, ge=1, le=65536, unit="images per accelerator", help="batch size of evaluation")
    eval_images: Literal["auto", "with-boxes", "all"] = setting(
        "auto",
        help="images that an evaluation detects on; with-boxes: those with a ground-truth box; auto: as the MLPerf "
        "reference for coco2017 in the closed division (SSD300: with-boxes), else all",
    )
    coco_eval_backend: Literal["auto", "hotcoco", "pycocotools"] = setting(
        "auto",
        formerly="metric",
        help="library that computes mAP; auto: hotcoco if installed; pycocotools verifies the final metrics",
    )

    log_dir: Path = setting(Path("results"), env="LOGDIR", heading="Log", help="parent folder of the run folders")
    run_dir: str = setting("", env="RUN_DIR", help="folder of this run; empty: log_dir/system/benchmark/start")
    checkpoint_every: str = setting(
        "evaluation",
        pattern=r"^(evaluation|[1-9]\d* (steps|epochs))$",
        help="evaluation, or '500 steps' or '2 epochs' to add more; a signal that stops the run also saves one",
    )
    resume: str = setting(
        "none",
        min_length=1,
        help="auto: resume from the latest valid checkpoint of the run folder, or of the last unfinished run; "
        "or a checkpoint file",
    )
    max_steps: int = setting(0, ge=0, unit="steps", help="stop after this many steps, for a trial; 0: no limit")
    step_timeout_s: float = setting(
        900.0,
        gt=0,
        unit="s",
        formerly="hang_timeout_s",
        help="a rank without a step in this time prints its stack traces and aborts the run",
    )
    run_index: int = setting(
        0,
        ge=0,
        le=9999,
        env="RUN_INDEX",
        formerly="experiment",
        help="number in the log's name, result_<run-index>.txt",
    )
    summary_json: str = setting("", formerly="summary", help="JSON file for the result, in every mode")
    tensorboard: bool = setting(
        False, help="also write TensorBoard events to the run folder; tensorboard must be installed separately"
    )
    wandb: bool = setting(
        False, help="also log to Weights & Biases (WANDB_MODE=offline: to the run folder); wandb must be installed"
    )
    mlflow: bool = setting(
        False, help="also log to MLflow, to the run folder or MLFLOW_TRACKING_URI; mlflow must be installed"
    )
    log_every: int = setting(20, ge=1, le=1_000_000, unit="steps", help="interval between readings of the loss")
    echo_log: bool = setting(
        False, env="ECHO_LOG", help="also print the MLPerf log to stdout; run.sub and the container set it"
    )
    system: str = setting("toy", env="DGXSYSTEM", pattern=r"^[\w.-]+$", help="name of the system")
    ruleset: str = setting("1.1.0", help="MLPerf training ruleset of the log (0.7.0 to 1.1.0)")
    division: Literal["closed", "open"] = setting("closed", help="open if data, model or recipe differ from MLPerf's")
    org: str = setting("unknown", min_length=1, pattern=r"^[^,\n]+$", help="submitting organization")
    platform: str = setting("", help="platform of the submission; empty: nodes × system")
    availability: Literal["cloud", "onprem", "preview", "research"] = setting(
        "onprem", formerly="status", help="availability of the system"
    )
    source_commit: str = setting(
        "",
        env="DETECTION_SOURCE_COMMIT",
        pattern=r"^([0-9a-f]{40}(-dirty)?)?$",
        formerly="commit",
        help="commit of this program for the log if its git repository is missing, as in a container",
    )
    page_cache_dropped: bool = setting(
        False,
        env="PAGE_CACHE_DROPPED",
        formerly="caches_cleared",
        help="./run_and_time.sh dropped the page cache before the run",
    )

    @field_validator("ruleset")
    @classmethod
    def _check_ruleset(cls, ruleset: str) -> str:
        return require_ruleset(cls.benchmark, ruleset)

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(f"grad_accum_steps {self.grad_accum_steps} should divide batch_size {self.batch_size}")
        needed = [name for name in CUSTOM_DATA_SETTINGS if self.mode != "evaluate" or name.startswith("val")]
        if missing := [name for name in needed if not getattr(self, name)]:
            if any(getattr(self, name) for name in CUSTOM_DATA_SETTINGS):
                flags = [f"--{name.replace('_', '-')}" for name in missing]
                raise ValueError(f"custom data needs {len(needed)} settings. Also pass {', '.join(flags)}.")
        elif self.dataset in SYNTHETIC_DATASETS:
            raise ValueError(
                f"--dataset {self.dataset} is generated, but --train-images names other images. "
                "Pass another name by --dataset."
            )
        if self.mode == "evaluate" and not self.weights:
            raise ValueError("--mode evaluate requires weights. Pass --weights FILE.")
        if self.mode != "train" and self.resume != "none":
            raise ValueError(f"--mode {self.mode} does not resume. Pass --weights FILE instead of --resume.")
        if self.mode != "train" and self.eval_before_training:
            raise ValueError(f"--eval-before-training requires --mode train, not {self.mode}.")
        if self.optimizer != "sgd" and self.optimizer_backend != "torch":
            raise ValueError(f"--optimizer-backend {self.optimizer_backend}: has only sgd. Pass torch for others.")
        if self.jpeg_decoder == "gpu" and self.image_cache == "host":
            raise ValueError("--jpeg-decoder gpu excludes --image-cache host. Pass --image-cache device or none.")
        return self

    @model_validator(mode="after")
    def _resolve_num_classes(self) -> Self:
        if self.num_classes == 0 and self.dataset in KNOWN_NUM_CLASSES:
            object.__setattr__(self, "num_classes", KNOWN_NUM_CLASSES[self.dataset])
        return self

    @model_validator(mode="after")
    def _resolve_eval_images(self) -> Self:
        if self.eval_images == "auto":
            as_reference = self.dataset == "coco2017" and self.division == "closed"
            object.__setattr__(self, "eval_images", self.reference_eval_images if as_reference else "all")
        return self

    @property
    def backbone_name(self) -> str:
        """ResNet backbone by its torchvision name."""
        raise NotImplementedError

    @property
    def backbone_weights(self) -> str:
        """ImageNet weights to start from. Empty if `weights` replaces them or the mode does not train."""
        return self.pretrained_backbone if self.mode == "train" and not self.weights else ""

    @property
    def network_name(self) -> str:
        """Name of the network. Workloads with several networks override it."""
        return self.benchmark

    @property
    def trains(self) -> bool:
        """True if the mode trains the network."""
        return self.mode in ("train", "bench-train")

    @property
    def required_splits(self) -> tuple[Literal["train", "val"], ...]:
        """Splits of the data set that the mode reads."""
        if self.mode.startswith("bench") and self.benchmark_input == "synthetic":
            return ()
        return ("val",) if self.mode in ("evaluate", "bench-infer") else ("train", "val")

    @property
    def device_preprocessing(self) -> bool:
        """True if workers send whole images and the device crops and resizes them."""
        return self.image_cache == "device" or self.jpeg_decoder == "gpu"

    @property
    def has_custom_data(self) -> bool:
        """True for data that are neither published with checksums nor generated."""
        return self.dataset not in (*KNOWN_NUM_CLASSES, *SYNTHETIC_DATASETS)

    def unrounded_peak_lr(self, world_size: int) -> float:
        """Return the learning rate after warm-up, before rounding."""
        raise NotImplementedError

    def peak_lr(self, world_size: int) -> float:
        """Return the learning rate after warm-up."""
        raise NotImplementedError

    def global_batch_size(self, world_size: int) -> int:
        """Return the images per optimizer step over all ranks."""
        return self.batch_size * world_size

    def eval_blocks(self) -> list[range]:
        """Return blocks of epochs between evaluations: range(1, 41), range(41, 51), ... The last ends at `epochs`."""
        ends = [epoch for epoch in self.eval_epochs if epoch < self.epochs] + [self.epochs]
        starts = [1] + [end + 1 for end in ends[:-1]]
        return [range(start, end + 1) for start, end in zip(starts, ends, strict=True)]

    def submission_platform(self, num_nodes: int) -> str:
        """Return the platform of the submission, such as 1xDGX1."""
        return self.platform or f"{num_nodes}x{self.system}"

    def run_folder(self, start: str) -> Path:
        """Return `run_dir` if set, else the run to resume, else a new folder for `start` (YYYY-mm-dd_HH-MM-SS)."""
        if self.run_dir:
            return Path(self.run_dir)
        parent = self.log_dir / self.system / self.benchmark
        unfinished = latest_unfinished(parent, self.run_index, self.epochs) if self.resume == "auto" else None
        return unfinished or parent / start

    def bn_group_size(self, world_size: int) -> int:
        """Return the number of ranks that share batch norm statistics."""
        return self.bn_group or world_size

    def check_world_size(self, world_size: int) -> None:
        """Raise InputError if the settings do not fit this number of ranks."""
        group_size = self.bn_group_size(world_size)
        if world_size % group_size:
            raise InputError(
                f"--bn-group {group_size}: does not divide the {world_size} ranks. Pass a divisor, or 0 for all."
            )

    def checkpoint_due(self, unit: Literal["steps", "epochs"], count: int) -> bool:
        """Return whether a checkpoint is due after `count` steps or epochs."""
        interval, _, interval_unit = self.checkpoint_every.partition(" ")
        return interval_unit == unit and count % int(interval) == 0


def round_to_multiple(lr: float, multiple: float) -> float:
    """Round a learning rate to a multiple, at least the first. Return it unchanged if the multiple is 0."""
    return round(max(1, round(lr / multiple)) * multiple, 12) if multiple else lr


T = TypeVar("T", bound=RunConfig)


def load(
    cls: type[T],
    prefix: str,
    argv: Sequence[str],
    environ: Mapping[str, str] | None = None,
    *,
    presets: Mapping[str, Mapping[str, Mapping[str, str]]] | None = None,
) -> ResolvedSettings[T]:
    """Resolve the settings of a workload from flags and the environment. Raises InputError with every error.

    `--val-images` without `--dataset` sets the data set to custom, since it replaces the data of the config file.
    presets: as in `settings.resolve`.
    """
    flags = {word.split("=")[0] for word in argv}
    if flags & {"--train-images", "--val-images"} and "--dataset" not in flags:
        argv = [*argv, "--dataset", "custom"]
    return resolve(cls, prefix, argv, environ, presets=presets)
