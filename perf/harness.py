"""Harness of the benchmarks: their context, their size, and the form of a result."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from detection.data import coco
from detection.runtime.device import Precision, force_eager, select_precision
from detection.runtime.distributed import DistContext
from perf.photos import PhotoSet, synthesize_gt, synthesize_photos
from perf.roofline import Roofline, Work, measure_roofline
from perf.timing import Quartiles, Variant, interleave, quartiles
from ssd.config import Config
from ssd.data import SSDTrainSource

# Images of COCO's val2017, for which the COCO metric has a required speedup.
FULL_METRIC_IMAGES = 5000

# Conversion of seconds per image. Units per second are better if higher, all others if lower.
UNITS: dict[str, Callable[[float], float]] = {
    "img/s": lambda seconds: 1 / seconds,
    "ms/img": lambda seconds: 1000 * seconds,
    "s": lambda seconds: seconds,
}


def num_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def has_compiler(device: torch.device) -> bool:
    """Return whether torch.compile has a compiler for a device. Without one, run all compiled code in eager mode."""
    if device.type == "cpu":
        return True
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        print(f"not compiled: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        force_eager()
        return False
    return True


@dataclass(frozen=True)
class BenchSize:
    """Amount of work of each benchmark. The defaults are those of a CPU."""

    rounds: int = 9  # samples of each variant
    limit_s: float = 60  # time after which a comparison ends, once it has three rounds
    warm_up: bool = True  # leave out the first call of each variant
    photos: int = 256  # different photos
    batch_size: int = 8  # of training
    batch_sizes: tuple[int, ...] = (2, 4, 8, 16, 32)  # compared with each other
    workers: tuple[int, ...] = tuple(sorted({0, 1, 2, 4, *range(4, num_cores() + 1, 4)}))  # compared with each other
    input_images: int = 400  # per worker, in a sample of the input pipeline
    predictions: int = 4  # images per call of detection
    metric_images: tuple[int, ...] = (500, FULL_METRIC_IMAGES)  # data set sizes for the COCO metric
    full_metric_rounds: int = 3  # samples of the metric with FULL_METRIC_IMAGES
    eval_images: int = 500
    eval_batch_size: int = 32
    baseline_eval_images: int = 32  # fewer, since the baseline is slower
    epoch_images: int = 64
    baseline_epoch_images: int = 32
    maskrcnn_batch_size: int = 2
    maskrcnn_image_px: tuple[int, int] = (320, 533)  # limits of the short and the long side
    maskrcnn_eval_images: int = 500
    retinanet_batch_size: int = 2
    retinanet_image_px: int = 800
    retinanet_eval_images: int = 200
    memory_images: tuple[int, int] = (1000, 10_000)  # images after which the memory of a worker is read
    compiled: bool = True  # also measure compiled steps
    traced_steps: int = 4  # steps of the epoch that --profile traces
    matrix_side: int = 2048  # of the roofline's matrix product
    copy_bytes: int = 2**28  # of the roofline's copy


TINY = BenchSize(
    rounds=1,
    limit_s=0,
    warm_up=False,
    photos=4,
    batch_size=2,
    batch_sizes=(1, 2),
    workers=(0, 1),
    input_images=4,
    predictions=1,
    metric_images=(20,),
    full_metric_rounds=1,
    eval_images=4,
    eval_batch_size=2,
    baseline_eval_images=2,
    epoch_images=2,
    baseline_epoch_images=2,
    maskrcnn_batch_size=1,
    maskrcnn_image_px=(64, 96),
    maskrcnn_eval_images=2,
    retinanet_batch_size=1,
    retinanet_image_px=128,
    retinanet_eval_images=2,
    memory_images=(32, 128),
    compiled=False,
    traced_steps=1,
    matrix_side=64,
    copy_bytes=2**20,
)
"""Smallest sizes, to try the benchmarks."""


def bench_size(*, on_cpu: bool, quick: bool = False) -> BenchSize:
    """Return the size for a CPU or an accelerator. quick: ten minutes on two cores for the parts of SSD."""
    size = BenchSize()
    if not on_cpu:
        size = BenchSize(
            batch_size=228,
            batch_sizes=(64, 228) if quick else (32, 64, 128, 228, 456),
            predictions=64,
            eval_images=5000,
            eval_batch_size=256,
            baseline_eval_images=256,
            epoch_images=228 * (40 if quick else 80),
            baseline_epoch_images=228 * (4 if quick else 8),
            maskrcnn_batch_size=4,
            maskrcnn_image_px=(800, 1333),
            retinanet_batch_size=32,
            matrix_side=8192,
            copy_bytes=2**31,
        )
    elif quick:
        size = BenchSize(
            batch_sizes=(4, 8, 16),
            epoch_images=32,
            baseline_epoch_images=16,
            maskrcnn_batch_size=1,
            maskrcnn_image_px=(256, 426),
            retinanet_batch_size=1,
            retinanet_image_px=256,
            compiled=False,
        )
    if not quick:
        return size
    workers = tuple(sorted({0, 1, num_cores()}))
    size = replace(size, rounds=5, limit_s=12, photos=128, workers=workers, input_images=160)
    return replace(size, metric_images=(500,), full_metric_rounds=1, maskrcnn_eval_images=50, retinanet_eval_images=20)


@dataclass(frozen=True)
class Result:
    """Measurement of one variant of a part.

    value, roofline: in `unit`. The roofline is the bound set by the machine's peak rates, roofline_fraction the part
    of it that is reached. flop, bytes: per image. is_baseline: compared with the last result that is not a baseline.
    speedup: of that result over this baseline, pair by pair. requirement: name of the requirement that this answers.
    """

    part: str
    variant: str
    unit: str
    value: Quartiles
    is_baseline: bool = False
    speedup: Quartiles | None = None
    requirement: str = ""
    flop: float = 0.0
    bytes: float = 0.0
    roofline: float | None = None
    roofline_fraction: float | None = None


@dataclass(frozen=True)
class BenchContext:
    """Context of the benchmarks: device, precision and photos.

    scratch: an empty folder for data sets. real_photos: measured in addition to synthetic ones.
    """

    device: torch.device
    precision_name: str
    seed: int
    size: BenchSize
    scratch: Path
    real_photos: PhotoSet | None = None

    @cached_property
    def precision(self) -> Precision:
        """Precision of the network."""
        return select_precision(self.precision_name, self.device)

    @cached_property
    def ranks(self) -> DistContext:
        """A process group of this process alone."""
        return DistContext(0, 1, self.device)

    @cached_property
    def photo_sets(self) -> list[PhotoSet]:
        """Synthetic photos, then real ones if given."""
        synthetic = synthesize_photos(self.scratch / "synthetic", self.size.photos, self.seed)
        return [synthetic, self.real_photos.with_boxes_of(synthetic)] if self.real_photos else [synthetic]

    @property
    def photos(self) -> PhotoSet:
        """The real photos if given, otherwise the synthetic ones."""
        return self.photo_sets[-1]

    @property
    def num_workers(self) -> int:
        """Data workers of a run: one per core, less one core that keeps the accelerator busy."""
        return num_cores() if self.device.type == "cpu" else max(1, num_cores() - 1)

    def polygon_split(self) -> coco.Split:
        """Return the synthetic photos with polygons, as Mask R-CNN trains on them."""
        folder = self.scratch / "synthetic"
        synthesize_photos(folder, self.size.photos, self.seed)
        return coco.read(*coco.standard_paths(folder, "train"), segmentations=True).drop_crowds().drop_empty_images()

    def gt_split(self, num_images: int, *, segmentations: bool = False) -> coco.Split:
        """Return ground truth of `num_images` images without image files."""
        folder = self.scratch / f"gt_{num_images}_{segmentations}"
        return synthesize_gt(folder, num_images, self.seed, segmentations=segmentations)

    def roofline(self, num_threads: int | None = None, precision_name: str | None = None) -> Roofline:
        """Return peak rates of the device. Defaults: all CPU threads, and the precision of the context."""
        precision_name, num_threads = precision_name or self.precision.name, num_threads or torch.get_num_threads()
        return measure_roofline(self.device, precision_name, num_threads, self.size.matrix_side, self.size.copy_bytes)

    def config(self, **settings: Any) -> Config:
        """Return the settings of an SSD run in this context, with `settings` in place of defaults."""
        defaults: dict[str, Any] = {"batch_size": self.size.batch_size, "compile": "off"}
        defaults |= {"device": str(self.device), "precision": self.precision.name, "seed": self.seed}
        return Config(**defaults | settings)

    def make_data_dir(self, photos: PhotoSet, train_images: int, val_images: int = 1) -> Path:
        """Return the folder of a data set of that many images. Photos repeat once all were used."""
        folder = self.scratch / f"{photos.name} {train_images} {val_images}"
        return folder if folder.exists() else photos.make_data_dir(folder, train_images, val_images)

    def make_train_source(
        self, photos: PhotoSet, train_images: int, val_images: int = 1, **settings: Any
    ) -> SSDTrainSource:
        """Open such a data set as a run does."""
        folder = self.make_data_dir(photos, train_images, val_images)
        config = self.config(data_dir=folder, num_classes=photos.num_classes, **settings)
        return SSDTrainSource(config, self.ranks, self.seed)

    def compare(
        self,
        part: str,
        optimized: Variant,
        *baselines: Variant,
        unit: str = "ms/img",
        work: Work | None = None,
        roofline: Roofline | None = None,
        requirement: str = "",
        rounds: int | None = None,
        warm_up: bool = True,
    ) -> Iterator[Result]:
        """Time `optimized` and its baselines, interleaved. The first baseline answers the requirement.

        work: of an image, if a roofline makes sense. roofline: that of the context if None.
        """
        samples = interleave(
            [optimized, *baselines],
            self.device,
            rounds=rounds or self.size.rounds,
            limit_s=self.size.limit_s,
            warm_up=warm_up and self.size.warm_up,
        )
        convert = UNITS[unit]
        values = [quartiles([convert(s) for s in variant_samples]) for variant_samples in samples]
        first = Result(part, optimized.name, unit, values[0])
        if work:
            min_s = (roofline or self.roofline()).min_s(work)
            fraction = min_s / quartiles(samples[0]).median
            first = replace(first, flop=work.flop, bytes=work.bytes)
            first = replace(first, roofline=convert(min_s), roofline_fraction=fraction)
        yield first
        for variant, value, baseline_s in zip(baselines, values[1:], samples[1:], strict=True):
            speedup = quartiles([b / a for a, b in zip(samples[0], baseline_s, strict=True)])
            yield Result(part, variant.name, unit, value, True, speedup, requirement)
            requirement = ""
