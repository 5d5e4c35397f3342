"""Harness of the benchmarks: their context, their size, and the form of a result."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from detection.data import coco
from detection.runtime.device import Precision, select_precision
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


@dataclass(frozen=True)
class BenchSize:
    """Amount of work of each benchmark.

    rounds: samples of each variant. limit_s: time after which a comparison ends, once it has three rounds.
    warm_up: leave out the first call of each variant. photos: number of different photos.
    batch_size: of training. batch_sizes, workers: compared with each other. input_images: images per worker in a
    sample of the input pipeline. predictions: images per call of detection.
    metric_images: data set sizes for the COCO metric. full_metric_rounds: samples for COCO's 5,000 images.
    eval_images: images of an evaluation, in batches of eval_batch_size. epoch_images: images of an epoch.
    baseline_eval_images, baseline_epoch_images: the same for the slower baselines.
    maskrcnn_batch_size, maskrcnn_image_px: of Mask R-CNN's training: images, and limits of short and long side.
    maskrcnn_eval_images: images whose detections are evaluated.
    memory_images: numbers of images after which the memory of a worker is read.
    data_sizes: data set sizes to compare. compiled: also measure compiled steps. traced_steps: steps of the epoch
    that --profile traces. matrix_side, copy_bytes: operands of the roofline's matrix product and copy.
    """

    rounds: int
    limit_s: float
    warm_up: bool
    photos: int
    batch_size: int
    batch_sizes: tuple[int, ...]
    workers: tuple[int, ...]
    input_images: int
    predictions: int
    metric_images: tuple[int, ...]
    full_metric_rounds: int
    eval_images: int
    eval_batch_size: int
    baseline_eval_images: int
    epoch_images: int
    baseline_epoch_images: int
    maskrcnn_batch_size: int
    maskrcnn_image_px: tuple[int, int]
    maskrcnn_eval_images: int
    memory_images: tuple[int, int]
    data_sizes: tuple[int, ...]
    compiled: bool
    traced_steps: int
    matrix_side: int
    copy_bytes: int


def num_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def full_size(on_cpu: bool) -> BenchSize:
    """Return the default size."""
    return BenchSize(
        rounds=9,
        limit_s=60,
        warm_up=True,
        photos=256,
        batch_size=8 if on_cpu else 228,
        batch_sizes=(2, 4, 8, 16, 32) if on_cpu else (32, 64, 128, 228, 456),
        workers=tuple(sorted({0, 1, 2, 4, *range(4, num_cores() + 1, 4)})),
        input_images=400,
        predictions=4 if on_cpu else 64,
        metric_images=(500, FULL_METRIC_IMAGES),
        full_metric_rounds=3,
        eval_images=500 if on_cpu else 5000,
        eval_batch_size=32 if on_cpu else 256,
        baseline_eval_images=32 if on_cpu else 256,
        epoch_images=64 if on_cpu else 228 * 80,
        baseline_epoch_images=32 if on_cpu else 228 * 8,
        maskrcnn_batch_size=2 if on_cpu else 4,
        maskrcnn_image_px=(320, 533) if on_cpu else (800, 1333),
        maskrcnn_eval_images=500,
        memory_images=(1000, 10_000),
        data_sizes=(100, 1000, 10_000),
        compiled=True,
        traced_steps=4,
        matrix_side=2048 if on_cpu else 8192,
        copy_bytes=2**28 if on_cpu else 2**31,
    )


def quick_size(on_cpu: bool) -> BenchSize:
    """Return the size of --quick: ten minutes on two cores for the parts of SSD."""
    return replace(
        full_size(on_cpu),
        rounds=5,
        limit_s=12,
        photos=128,
        batch_sizes=(4, 8, 16) if on_cpu else (64, 228),
        workers=tuple(sorted({0, 1, num_cores()})),
        input_images=160,
        metric_images=(500,),
        full_metric_rounds=1,
        epoch_images=32 if on_cpu else 228 * 40,
        baseline_epoch_images=16 if on_cpu else 228 * 4,
        maskrcnn_batch_size=1 if on_cpu else 4,
        maskrcnn_image_px=(256, 426) if on_cpu else (800, 1333),
        maskrcnn_eval_images=50,
        compiled=not on_cpu,
    )


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
    with_baselines: also measure the baselines.
    """

    device: torch.device
    precision_name: str
    seed: int
    size: BenchSize
    scratch: Path
    real_photos: PhotoSet | None = None
    with_baselines: bool = True

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
    def num_workers(self) -> int:
        """Data workers of a run: one per core, less one core that keeps the accelerator busy."""
        return num_cores() if self.device.type == "cpu" else max(1, num_cores() - 1)

    @property
    def photos(self) -> PhotoSet:
        """The real photos if given, otherwise the synthetic ones."""
        return self.photo_sets[-1]

    def polygon_split(self) -> coco.Split:
        """Return the synthetic photos with polygons, as Mask R-CNN trains on them."""
        folder = self.scratch / "synthetic"
        synthesize_photos(folder, self.size.photos, self.seed)
        return coco.read(*coco.standard_paths(folder, "train"), segmentations=True).drop_crowds().drop_empty_images()

    def gt_split(self, num_images: int) -> coco.Split:
        """Return ground truth of `num_images` images without image files."""
        return synthesize_gt(self.scratch / f"gt_{num_images}", num_images, self.seed)

    def roofline(self, num_threads: int | None = None, precision_name: str | None = None) -> Roofline:
        """Return peak rates of the device. Defaults: all CPU threads, and the precision of the context."""
        return measure_roofline(
            self.device,
            precision_name or self.precision.name,
            num_threads or torch.get_num_threads(),
            self.size.matrix_side,
            self.size.copy_bytes,
        )

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

    def baselines(self, variants: Iterable[Variant]) -> Iterable[Variant]:
        """Return `variants`, or nothing if baselines are not measured. A generator is then never started."""
        return variants if self.with_baselines else ()

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
        first = Result(part, optimized.name, unit, quartiles([convert(s) for s in samples[0]]))
        if work:
            min_s = (roofline or self.roofline()).min_s(work)
            fraction = min_s / quartiles(samples[0]).median
            first = replace(
                first, flop=work.flop, bytes=work.bytes, roofline=convert(min_s), roofline_fraction=fraction
            )
        yield first
        for index, (variant, baseline_s) in enumerate(zip(baselines, samples[1:], strict=True)):
            yield Result(
                part,
                variant.name,
                unit,
                quartiles([convert(s) for s in baseline_s]),
                is_baseline=True,
                speedup=quartiles([b / a for a, b in zip(samples[0], baseline_s, strict=True)]),
                requirement=requirement if index == 0 else "",
            )
