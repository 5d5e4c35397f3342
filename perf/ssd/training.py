"""Training from end to end: JPEG bytes to updated weights, as a run does it, and how its rate scales."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from detection.data.prefetch import prefetch
from detection.engine import train_loop
from detection.runtime.device import supports_jpeg_decode
from perf.harness import BenchContext, Result
from perf.roofline import count_flop
from perf.ssd import baseline
from perf.ssd.input import SMALL_BATCH, train_images
from perf.ssd.network import baseline_variant, build, in_precision, whole_step
from perf.timing import Variant, limit_threads
from ssd.config import Config
from ssd.model import SSD300

# float32 and channels first take twice the memory of a run's step.
BASELINE_BATCH = 128


def time_end_to_end(bench: BenchContext) -> Iterator[Result]:
    """Epochs from files to weights: of a run, the plain way, and of the run's step alone, on a batch that is there."""
    size = bench.size.batch_size
    work = count_flop(SSD300, bench.precision.dtype, backward=True, batch_size=size)
    step = Variant("its step alone", whole_step(bench, run_config(bench, size)), size)
    results = bench.compare(
        "end-to-end",
        epochs(bench, size, bench.num_workers),
        *bench.baselines(baseline_epochs(bench)),
        step,
        unit="img/s",
        work=work,
        requirement="end to end" if bench.baseline else "",
    )
    yield replace(next(results), requirement="end to end rate")
    yield from results
    for settings in cache_variants(bench):
        kept = epochs(bench, size, bench.num_workers, **settings)
        yield from bench.compare("end-to-end", kept, step, unit="img/s", work=work)


def cache_variants(bench: BenchContext) -> list[dict[str, Any]]:
    """Where decoded images can be kept, and who else can decode them, as settings."""
    found: list[dict[str, Any]] = [{"image_cache": "host"}]
    if bench.device.type != "cpu":
        found.append({"image_cache": "device"})
    if supports_jpeg_decode(bench.device):
        found.append({"jpeg_decoder": "gpu"})
    return found


def time_scaling(bench: BenchContext) -> Iterator[Result]:
    """Epochs from files to weights by batch size and workers, beside the usual ones; the input by data size."""
    size = bench.size.batch_size
    sizes = [other for other in bench.size.batch_sizes if other != size]
    workers = [other for other in bench.size.workers if other != bench.num_workers]
    yield from bench.compare(
        "scaling",
        epochs(bench, size, bench.num_workers),
        *(epochs(bench, other, bench.num_workers) for other in sizes),
        *(epochs(bench, size, other) for other in workers),
        unit="img/s",
    )
    for num_images in bench.size.data_sizes:
        yield from data_of(bench, num_images)


def data_of(bench: BenchContext, num_images: int) -> Iterator[Result]:
    """Opening a data set of so many images, and reading of it here and there on one core."""
    variant = f"of {num_images} images"
    bench.make_data_dir(bench.photos, num_images)
    opening = Variant(f"open a data set {variant}", lambda: bench.open_data(bench.photos, num_images, num_workers=0))
    yield from bench.compare("scaling", opening, unit="s")
    dataset = train_images(bench.open_data(bench.photos, num_images, num_workers=0))
    rng = np.random.default_rng(bench.seed)

    def read() -> None:
        dataset.__getitems__([(1, int(index)) for index in rng.integers(0, num_images, SMALL_BATCH)])

    with limit_threads(1):
        yield from bench.compare("scaling", Variant(f"one core, {variant}", read, SMALL_BATCH), unit="img/s")


def run_config(bench: BenchContext, batch_size: int, **settings: Any) -> Config:
    """A run's settings, compiled where a run would be."""
    return bench.config(num_classes=bench.photos.num_classes, batch_size=batch_size, compile="auto", **settings)


def epochs(bench: BenchContext, batch_size: int, num_workers: int, **settings: Any) -> Variant:
    """Epochs of a run, one a call, through its own data, loader, prefetch and step."""
    num_images = max(1, bench.size.epoch_images // batch_size) * batch_size
    config = run_config(bench, batch_size, num_workers=num_workers, **settings)
    benchmark, state = build(bench, config)
    data = bench.open_data(bench.photos, num_images, batch_size=batch_size, num_workers=num_workers, **settings)
    numbers = count(1)

    def run() -> None:
        epoch = next(numbers)
        for share in prefetch(data.train_batches(epoch), bench.device):
            train_loop.train_step(
                state, share, benchmark.lr_schedule(state.step, epoch), benchmark, config, bench.ranks
            )

    where = {"none": "", "host": ", decoded images kept", "device": ", decoded images kept by the device"}
    kept = where[config.image_cache] + ", decoded by the device" * (config.jpeg_decoder == "gpu")
    variant = f"{config.precision}, batch {batch_size}, {num_workers} workers, {bench.photos.name}{kept}"
    return Variant(variant, in_precision(config.precision, bench, run), num_images)


def baseline_epochs(bench: BenchContext) -> Iterator[Variant]:
    """Epochs of the plain way."""
    size = min(bench.size.batch_size, BASELINE_BATCH)
    num_images = max(1, bench.size.baseline_epoch_images // size) * size
    split = train_images(bench.open_data(bench.photos, num_images, num_workers=0)).split
    loader = baseline.make_loader(baseline.Samples(split), size, bench.num_workers, bench.device)
    step = baseline.make_step(bench.device, bench.photos.num_classes)

    def run() -> None:
        for batch in prefetch(loader, bench.device):
            step(batch)

    yield baseline_variant(bench, f"plain, float32, batch {size}, {bench.num_workers} workers", run, num_images)
