"""What the parts of the bench share: what is measured on, how much of it, and the form of a result."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from detection.data import coco
from detection.runtime.device import Precision, precision
from detection.runtime.distributed import Ranks
from perf.photos import Photos, make_up, make_up_truth
from perf.roofline import Limits, Work, measure
from perf.timing import Side, Spread, in_turns, spread
from ssd.config import Config
from ssd.data import SSDData

# Images of COCO's val2017, on which the requirement on the metric stands.
FULL_METRIC_IMAGES = 5000

# What the seconds of an image are turned into; more of what is per second is better, of all else less.
UNITS: dict[str, Callable[[float], float]] = {
    "img/s": lambda seconds: 1 / seconds,
    "ms/img": lambda seconds: 1000 * seconds,
    "s": lambda seconds: seconds,
}


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    rounds: samples of each side. limit_s: after which a comparison ends if three rounds are done. warm: whether the
    first call of each side is left out. photos: different ones. batch_size: of training; batch_sizes: that are
    compared. workers: numbers of them that are compared. input_images: per worker, in a sample of the input.
    predictions: images of a call of detection. metric_images: each a comparison; full_metric_rounds: samples on
    COCO's 5,000. eval_images: evaluated, in batches of eval_batch_size, and eval_images_plain the plain way.
    epoch_images: trained on from end to end, and epoch_images_plain the plain way. maskrcnn_batch_size: of Mask R-CNN's
    training, with images of maskrcnn_image_px: the short side, and the long one at most. maskrcnn_eval_images: whose
    detections are evaluated. read_images: after how many the memory of a worker is read, and after how many again.
    data_sizes: images of data sets that are compared. compiled: whether compiled steps are measured. traced_steps: of
    an epoch, for --profile. matrix_side, copy_bytes: what the limits are measured with.
    """

    rounds: int
    limit_s: float
    warm: bool
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
    eval_images_plain: int
    epoch_images: int
    epoch_images_plain: int
    maskrcnn_batch_size: int
    maskrcnn_image_px: tuple[int, int]
    maskrcnn_eval_images: int
    read_images: tuple[int, int]
    data_sizes: tuple[int, ...]
    compiled: bool
    traced_steps: int
    matrix_side: int
    copy_bytes: int


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def whole(on_cpu: bool) -> Scale:
    """All that is measured of a machine."""
    return Scale(
        rounds=9,
        limit_s=60,
        warm=True,
        photos=256,
        batch_size=8 if on_cpu else 228,
        batch_sizes=(2, 4, 8, 16, 32) if on_cpu else (32, 64, 128, 228, 456),
        workers=tuple(sorted({0, 1, 2, 4, *range(4, cores() + 1, 4)})),
        input_images=400,
        predictions=4 if on_cpu else 64,
        metric_images=(500, FULL_METRIC_IMAGES),
        full_metric_rounds=3,
        eval_images=500 if on_cpu else 5000,
        eval_batch_size=32 if on_cpu else 256,
        eval_images_plain=32 if on_cpu else 256,
        epoch_images=64 if on_cpu else 228 * 80,
        epoch_images_plain=32 if on_cpu else 228 * 8,
        maskrcnn_batch_size=2 if on_cpu else 4,
        maskrcnn_image_px=(320, 533) if on_cpu else (800, 1333),
        maskrcnn_eval_images=500,
        read_images=(1000, 10_000),
        data_sizes=(100, 1000, 10_000),
        compiled=True,
        traced_steps=4,
        matrix_side=2048 if on_cpu else 8192,
        copy_bytes=2**28 if on_cpu else 2**31,
    )


def quick(on_cpu: bool) -> Scale:
    """What two cores do in ten minutes, of SSD's parts."""
    return replace(
        whole(on_cpu),
        rounds=5,
        limit_s=12,
        photos=128,
        batch_sizes=(4, 8, 16) if on_cpu else (64, 228),
        workers=tuple(sorted({0, 1, cores()})),
        input_images=160,
        metric_images=(500,),
        full_metric_rounds=1,
        epoch_images=32 if on_cpu else 228 * 40,
        epoch_images_plain=16 if on_cpu else 228 * 4,
        maskrcnn_batch_size=1 if on_cpu else 4,
        maskrcnn_image_px=(256, 426) if on_cpu else (800, 1333),
        maskrcnn_eval_images=50,
        compiled=not on_cpu,
    )


@dataclass(frozen=True)
class Result:
    """What one way to do the work of a part gave.

    beside: whether it was measured for comparison with the result before that is not. value, limit: in `unit`; the
    limit is what the machine's peak allows. share: of the limit that is reached. flop, bytes: of an image. times:
    of one beside, how many times as fast ours is, pair by pair. requirement: the one that this answers.
    """

    part: str
    variant: str
    unit: str
    value: Spread
    beside: bool = False
    times: Spread | None = None
    requirement: str = ""
    flop: float = 0.0
    bytes: float = 0.0
    limit: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class Bench:
    """What is measured on: a device, a precision, photos. baseline: whether the plain way runs beside.

    scratch: an empty folder for data sets. real: photos to measure on too.
    """

    device: torch.device
    precision_name: str
    seed: int
    scale: Scale
    scratch: Path
    real: Photos | None = None
    baseline: bool = True

    @cached_property
    def precision(self) -> Precision:
        """Of the network."""
        return precision(self.precision_name, self.device)

    @cached_property
    def ranks(self) -> Ranks:
        """This process, alone."""
        return Ranks(0, 1, self.device)

    @cached_property
    def sources(self) -> list[Photos]:
        """Made-up photos and, where there are any, real ones."""
        made_up = make_up(self.scratch / "drawn", self.scale.photos, self.seed)
        return [made_up, self.real.with_boxes_of(made_up)] if self.real else [made_up]

    @property
    def num_workers(self) -> int:
        """Data workers of a run: one a core, or one less where an accelerator has to be kept busy by the last."""
        return cores() if self.device.type == "cpu" else max(1, cores() - 1)

    @property
    def photos(self) -> Photos:
        """The real photos, or else the made-up ones."""
        return self.sources[-1]

    def outlined(self) -> coco.Split:
        """The made-up photos with the outlines of what is on them, as Mask R-CNN trains on."""
        folder = self.scratch / "drawn"
        make_up(folder, self.scale.photos, self.seed)
        return coco.read(*coco.layout(folder, "train"), segmentations=True).without_crowds().with_boxes()

    def truth(self, num_images: int) -> coco.Split:
        """Boxes of as many images, without their pictures."""
        return make_up_truth(self.scratch / f"truth_{num_images}", num_images, self.seed)

    def limits(self, num_threads: int | None = None, precision_name: str | None = None) -> Limits:
        """Peak rates of the device, on so many threads of the CPU (all) and in a precision (that of the bench)."""
        return measure(
            self.device,
            precision_name or self.precision.name,
            num_threads or torch.get_num_threads(),
            self.scale.matrix_side,
            self.scale.copy_bytes,
        )

    def config(self, **settings: Any) -> Config:
        """The settings of a run on this bench."""
        usual: dict[str, Any] = {"batch_size": self.scale.batch_size, "compile": "off"}
        usual |= {"device": str(self.device), "precision": self.precision.name, "seed": self.seed}
        return Config(**usual | settings)

    def lay_out(self, photos: Photos, train_images: int, val_images: int = 1) -> Path:
        """The folder of a data set of so many images; photos come again once all were used."""
        folder = self.scratch / f"{photos.name} {train_images} {val_images}"
        return folder if folder.exists() else photos.lay_out(folder, train_images, val_images)

    def open_data(self, photos: Photos, train_images: int, val_images: int = 1, **settings: Any) -> SSDData:
        """Such a data set as a run opens it."""
        folder = self.lay_out(photos, train_images, val_images)
        config = self.config(data_dir=folder, num_classes=photos.num_classes, **settings)
        return SSDData(config, self.ranks, self.seed)

    def plain(self, sides: Iterable[Side]) -> Iterable[Side]:
        """What a user would pick instead, if that is to be measured; else the sides are not even made."""
        return sides if self.baseline else ()

    def compare(
        self,
        part: str,
        ours: Side,
        *beside: Side,
        unit: str = "ms/img",
        work: Work | None = None,
        limits: Limits | None = None,
        requirement: str = "",
        rounds: int | None = None,
        warm: bool = True,
    ) -> Iterator[Result]:
        """Time our way and others beside it, in turns; the first of those answers the requirement.

        work: of an image, where a limit makes sense. limits: of the machine, if not those of the bench.
        """
        samples = in_turns(
            [ours, *beside],
            self.device,
            rounds=rounds or self.scale.rounds,
            limit_s=self.scale.limit_s,
            warm=warm and self.scale.warm,
        )
        convert = UNITS[unit]
        first = Result(part, ours.variant, unit, spread([convert(s) for s in samples[0]]))
        if work:
            least_s = (limits or self.limits()).least_s(work)
            share = least_s / spread(samples[0]).median
            first = replace(first, flop=work.flop, bytes=work.bytes, limit=convert(least_s), share=share)
        yield first
        for number, (side, theirs) in enumerate(zip(beside, samples[1:], strict=True)):
            yield Result(
                part,
                side.variant,
                unit,
                spread([convert(s) for s in theirs]),
                beside=True,
                times=spread([b / a for a, b in zip(samples[0], theirs, strict=True)]),
                requirement=requirement if number == 0 else "",
            )
