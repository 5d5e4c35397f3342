"""The settings that every benchmark has: what the loop, the data, the machine and the log need."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, ValidationInfo, model_validator
from pydantic.dataclasses import dataclass

from detection.config import device_names
from detection.config.settings import STRICT, Numbers, Resolved, resolve, setting
from detection.run_dir import newest_unfinished


def _every(value: Any, info: ValidationInfo) -> Any:
    match = re.fullmatch(r"every[ -]?(\d+)", value) if isinstance(value, str) else None
    if match is None:
        return value
    interval = int(match[1])
    if interval < 1:
        raise ValueError("an interval of epochs is at least 1")
    return tuple(range(interval, info.data.get("epochs", 0) + 1, interval)) or (interval,)


COCO_CLASSES = 81


def _not_background_alone(num_classes: int) -> int:
    if num_classes == 1:
        raise ValueError("the background is no category; 0 follows the annotations")
    return num_classes


NumClasses = Annotated[int, AfterValidator(_not_background_alone)]
"""Categories and the background; 0 is as many as there are."""

OWN_DATA = ("train_images", "train_annotations", "val_images", "val_annotations")
"""The settings that name data in place of DATADIR."""

DRAWN = ("toy", "synthetic_coco")
"""Data sets that the program draws itself."""

EvalEpochs = Annotated[Numbers, BeforeValidator(_every)]
"""Epochs to evaluate after, written `40,50` or `every 5`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """What every benchmark lets its user set; a benchmark gives the defaults that its rules name."""

    benchmark: ClassVar[str]

    mode: Literal["train", "evaluate", "bench-train", "bench-infer"] = setting(
        "train",
        heading="Run",
        help="evaluate: the figures of --weights; the benchmark modes: how fast, in img/s. Only train has a RESULT",
    )
    batch_size: int = setting(
        32,
        ge=1,
        le=65536,
        unit="images per accelerator and optimiser step",
        help="the learning rate follows it",
    )
    grad_accum_steps: int = setting(
        1,
        ge=1,
        le=4096,
        help="parts that a batch is computed in, one after the other; divides the batch size",
    )
    bn_group: int = setting(
        1, ge=0, le=65536, unit="ranks", help="share the statistics of batch norm; divides the ranks; 0: all of them"
    )
    momentum: float = setting(0.9, ge=0, lt=1, help="of SGD (MLPerf: .9)")
    weight_decay: float
    weight_decay_on_bias_and_norm: bool = setting(
        True, help="weight decay on biases and batch norm, too (MLPerf SSD: yes)"
    )
    bias_lr_factor: float = setting(1.0, gt=0, le=10, help="biases learn so much faster (MLPerf Mask R-CNN: 2)")
    freeze_batch_norm: bool = setting(
        False, help="use batch norm's running statistics and train neither its weights nor its biases"
    )
    pretrained_backbone: str = setting(
        "",
        help="ImageNet weights of the trunk, .pth or .npz (get_resnet34_backbone.sh); empty is random",
    )
    seed: int | None = setting(None, ge=0, lt=2**32, help="of everything random; none takes one from the system")
    epochs: int
    eval_epochs: EvalEpochs
    weights: str = setting(
        "", help="weights of the whole network to start from or evaluate: of this program, or a public checkpoint"
    )
    eval_before_training: bool = setting(False, help="evaluate once before training, on the clock")
    benchmark_input: Literal["both", "real", "synthetic"] = setting(
        "both", help="of the benchmark modes: images of the data set, or noise that is on the device already"
    )
    benchmark_steps: int = setting(20, ge=1, le=1_000_000, unit="steps", help="that the benchmark modes measure")
    benchmark_warmup: int = setting(5, ge=0, le=1_000_000, unit="steps", help="before those, not measured")

    data_dir: Path = setting(Path("data/coco"), env="DATADIR", heading="Data", help="folder in the layout of COCO 2017")
    train_images: str = setting(
        "", help="folder of training images, in place of DATADIR's; with the three that follow, or none of the four"
    )
    train_annotations: str = setting("", help="file of their annotations, in COCO's format")
    val_images: str = setting("", help="folder of evaluation images")
    val_annotations: str = setting("", help="file of their annotations, of the same categories")
    dataset: str = setting(
        "coco2017",
        pattern=r"^[\w.-]+$",
        help="what the data are, for the log; toy and synthetic_coco are drawn where they are absent; "
        "custom where --train-images names others and this none",
    )
    synthetic_images: int = setting(
        118_287,
        ge=1,
        le=1_000_000,
        env="SYNTHETIC_IMAGES",
        unit="images",
        help="training images that synthetic_coco has, and 5,000 of 118,287 as many to evaluate",
    )
    num_classes: NumClasses = setting(
        0, ge=0, le=10_000, help="categories and the background; 0: those of the annotations (coco2017: 81)"
    )
    skip_missing_images: bool = setting(False, help="train without the images that the folder lacks")
    last_batch: Literal["partial", "pad", "carry-over"] = setting(
        "partial",
        help="the last global batch of an epoch: what remains; or filled up with the epoch's first images, trained "
        "twice (pad), or with those of the next epoch, which it then lacks (carry-over)",
    )
    num_workers: int = setting(
        4, ge=0, le=256, unit="processes per rank", help="decode images; 0 decodes in the rank itself"
    )

    jpeg_decoder: Literal["cpu", "gpu"] = setting(
        "cpu", help="decodes training images: cpu, the data workers; gpu, an NVIDIA accelerator's JPEG decoder"
    )
    image_cache: Literal["none", "host", "device"] = setting(
        "none",
        help="keep decoded training images, filled in the first epoch: in the memory of the host, or of each device",
    )
    image_cache_gib: float = setting(
        0.0,
        ge=0,
        unit="GiB",
        help="that it takes at most of a node, or of a device; 0: half, or three quarters, of what is free then",
    )

    device: str = setting(
        "auto",
        pattern=r"^[a-z]+(:\d+)?$",
        heading="Machine",
        help=device_names.HELP,
    )
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = setting(
        "auto", help="auto: bf16 where the device is fast in it, else fp16 with loss scaling, else fp32"
    )
    gradient_dtype: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", help="what gradients travel between ranks in: half the bytes in bf16 or fp16, and less exact"
    )
    numa_binding: Literal["off", "node", "exclusive"] = setting(
        "off", help="tie ranks to cores near their accelerator: node: all of its NUMA node; exclusive: a share of those"
    )
    compile: Literal["auto", "on", "off"] = setting(
        "auto", help="fuse the operations of the network, before the clock starts; auto: on an accelerator"
    )
    optimizer_backend: Literal["torch", "apex"] = setting(
        "torch", help="whose fused optimiser kernel; apex must be installed by you"
    )
    channels_last: bool = setting(True, help="memory layout of images and weights")
    eval_batch_size: int = setting(32, ge=1, le=65536, unit="images per accelerator", help="of evaluation")
    coco_eval_backend: Literal["auto", "hotcoco", "pycocotools"] = setting(
        "auto", help="what computes the mAP; auto: hotcoco if it is installed; pycocotools confirms the last figures"
    )

    log_dir: Path = setting(Path("results"), env="LOGDIR", heading="Log", help="run folders are made here")
    run_dir: str = setting("", env="RUN_DIR", help="this run's folder; empty makes log_dir/system/benchmark/start")
    checkpoint_every: str = setting(
        "evaluation",
        pattern=r"^(evaluation|[1-9]\d* (steps|epochs))$",
        help="evaluation, or as '500 steps' or '2 epochs', which adds those; a signal that ends the run saves, too",
    )
    resume: str = setting(
        "none",
        min_length=1,
        help="auto: go on from the newest sound checkpoint of the run folder, or of the last run that is not finished; "
        "or the name of a checkpoint's file",
    )
    max_steps: int = setting(0, ge=0, unit="steps", help="end the run there, for a trial; 0: train to the end")
    step_timeout_s: float = setting(
        900.0, gt=0, unit="s", help="a rank that makes no step in this time says where it hangs and ends the run"
    )
    run_index: int = setting(0, ge=0, le=9999, env="RUN_INDEX", help="the log is result_<experiment>.txt")
    summary_json: str = setting("", help="file that the outcome is written to as JSON, in every mode")
    tensorboard: bool = setting(
        False, help="also write events for TensorBoard, to the run's folder; its package must be installed by you"
    )
    log_every: int = setting(20, ge=1, le=1_000_000, unit="steps", help="between lines of loss and throughput")
    system: str = setting("toy", env="DGXSYSTEM", pattern=r"^[\w.-]+$", help="name of the machine")
    ruleset: Literal["0.7.0", "1.0.0", "1.1.0"] = setting("1.1.0", help="of MLPerf training, for the log and its check")
    division: Literal["closed", "open"] = setting(
        "closed", help="open where data, model or recipe differ from MLPerf's"
    )
    org: str = setting("unknown", min_length=1, pattern=r"^[^,\n]+$", help="who runs it")
    platform: str = setting("", help="what it runs on; empty says nodes × system")
    availability: Literal["cloud", "onprem", "preview", "research"] = setting(
        "onprem", help="availability of the machine"
    )
    source_commit: str = setting(
        "",
        env="DETECTION_SOURCE_COMMIT",
        pattern=r"^([0-9a-f]{40}(-dirty)?)?$",
        help="of this program, for the log, where it lies without its git repository, as in a container",
    )
    page_cache_dropped: bool = setting(
        False, env="PAGE_CACHE_DROPPED", help="./run_and_time.sh dropped the system's caches"
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(f"grad_accum_steps {self.grad_accum_steps} should divide batch_size {self.batch_size}")
        if absent := [name for name in OWN_DATA if not getattr(self, name)]:
            if len(absent) < len(OWN_DATA):
                flags = [f"--{name.replace('_', '-')}" for name in absent]
                raise ValueError(
                    f"data of your own are named by four settings; {', '.join(flags)} should be given, too"
                )
        elif self.dataset in DRAWN:
            raise ValueError(
                f"dataset {self.dataset} is drawn by the program, and train_images names other pictures: "
                "give them another name by --dataset"
            )
        if self.mode == "evaluate" and not self.weights:
            raise ValueError("--mode evaluate evaluates a checkpoint: pass --weights FILE")
        if self.mode != "train" and self.resume != "none":
            raise ValueError(f"--mode {self.mode} resumes nothing: pass --weights FILE in place of --resume")
        if self.mode != "train" and self.eval_before_training:
            raise ValueError(f"--eval-before-training is for --mode train, not for {self.mode}")
        if self.jpeg_decoder == "gpu" and self.image_cache == "host":
            raise ValueError("--jpeg-decoder gpu leaves nothing to keep on the host: pass --image-cache device or none")
        return self

    @model_validator(mode="after")
    def _count_classes(self) -> Self:
        if self.num_classes == 0 and self.dataset == "coco2017":  # known, so that the clock need not wait for the file
            object.__setattr__(self, "num_classes", COCO_CLASSES)
        return self

    @property
    def trunk_name(self) -> str:
        """The ResNet that the network stands on, as torchvision calls it."""
        raise NotImplementedError

    @property
    def trunk_weights(self) -> str:
        """The ImageNet weights that a run starts from, if it does: not with those of a checkpoint."""
        return self.pretrained_backbone if self.mode == "train" and not self.weights else ""

    @property
    def network_name(self) -> str:
        """What is trained; a benchmark with several networks says which."""
        return self.benchmark

    @property
    def reads_data(self) -> tuple[Literal["train", "val"], ...]:
        """The splits of the data set that the mode reads."""
        if self.mode.startswith("bench") and self.benchmark_input == "synthetic":
            return ()
        return ("val",) if self.mode in ("evaluate", "bench-infer") else ("train", "val")

    @property
    def images_on_device(self) -> bool:
        """Whether the device makes the training images out of whole ones, which workers send it."""
        return self.image_cache == "device" or self.jpeg_decoder == "gpu"

    def exact_lr(self, world_size: int) -> float:
        """Learning rate after warm-up before it is rounded, if it is."""
        raise NotImplementedError

    def peak_lr(self, world_size: int) -> float:
        """Learning rate after warm-up."""
        raise NotImplementedError

    def global_batch_size(self, world_size: int) -> int:
        """Images per optimiser step on all ranks together."""
        return self.batch_size * world_size

    def blocks(self) -> list[range]:
        """Epochs between evaluations, from 1: range(1, 41), range(41, 51), ...; the last ends at `epochs`."""
        ends = [epoch for epoch in self.eval_epochs if epoch < self.epochs] + [self.epochs]
        starts = [1] + [end + 1 for end in ends[:-1]]
        return [range(start, end + 1) for start, end in zip(starts, ends, strict=True)]

    def submission_platform(self, nodes: int) -> str:
        """Name of what the run is on, such as 1xDGX1."""
        return self.platform or f"{nodes}x{self.system}"

    def run_folder(self, start: str) -> Path:
        """Folder of a run that began at `start` (YYYY-mm-dd_HH-MM-SS), if none was named; or of that to be resumed."""
        if self.run_dir:
            return Path(self.run_dir)
        parent = self.log_dir / self.system / self.benchmark
        unfinished = newest_unfinished(parent, self.run_index, self.epochs) if self.resume == "auto" else None
        return unfinished or parent / start

    def bn_ranks(self, world_size: int) -> int:
        """Ranks that share the statistics of batch norm."""
        return self.bn_group or world_size

    def saves_after(self, unit: Literal["steps", "epochs"], count: int) -> bool:
        """Whether a checkpoint is due after so many steps or epochs."""
        number, _, named = self.checkpoint_every.partition(" ")
        return named == unit and count % int(number) == 0


def to_multiple(lr: float, multiple: float) -> float:
    """A learning rate rounded to a multiple, at least to the first; as it is where the multiple is 0."""
    return round(max(1, round(lr / multiple)) * multiple, 12) if multiple else lr


T = TypeVar("T", bound=RunConfig)


def load(
    cls: type[T],
    prefix: str,
    argv: Sequence[str],
    environ: Mapping[str, str] | None = None,
    *,
    usage: str,
    presets: Mapping[str, Mapping[str, Mapping[str, str]]] | None = None,
) -> Resolved[T]:
    """Resolve the settings of a benchmark from flags and the environment; raises InputError with every mistake.

    Data that flags name are not those of the config file, nor are they COCO: unless a flag says what they are, too,
    the data set is called custom. presets: as in `config.resolve`.
    """
    flags = {word.split("=")[0] for word in argv}
    if "--train-images" in flags and "--dataset" not in flags:
        argv = [*argv, "--dataset", "custom"]
    return resolve(cls, prefix, argv, environ, usage=usage, presets=presets)
