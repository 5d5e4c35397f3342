"""End-to-end training, from JPEG bytes to updated weights, and its rate by batch size and number of workers."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

from detection.data.prefetch import prefetch
from detection.engine import optim, train_loop
from detection.runtime.device import supports_jpeg_decode
from perf.harness import BenchContext, Result
from perf.roofline import count_flop
from perf.ssd import baseline
from perf.ssd.input import train_dataset
from perf.ssd.network import baseline_variant, build, full_step, with_precision
from perf.timing import Variant
from ssd.config import Config
from ssd.model import SSD300

# float32 and channels first need twice the memory of a run's step.
BASELINE_BATCH = 128


def time_end_to_end(context: BenchContext) -> Iterator[Result]:
    """Time epochs from files to weights against the baseline, and against the step alone on a ready batch."""
    batch_size = context.size.batch_size
    work = count_flop(SSD300, context.precision.dtype, backward=True, batch_size=batch_size)
    step = Variant("its step alone", full_step(context, run_config(context, batch_size)), batch_size)
    results = context.compare(
        "end-to-end",
        epochs(context, batch_size, context.num_workers),
        step,
        baseline_epochs(context),
        unit="img/s",
        work=work,
        requirement="end to end of step",
    )
    yield replace(next(results), requirement="end to end rate")
    yield from results
    cache_settings = [{"image_cache": "host"}]
    if context.device.type != "cpu":
        cache_settings.append({"image_cache": "device"})
    if supports_jpeg_decode(context.device):
        cache_settings.append({"jpeg_decoder": "gpu"})
    for settings in cache_settings:
        cached = epochs(context, batch_size, context.num_workers, **settings)
        yield from context.compare("end-to-end", cached, step, unit="img/s", work=work)


def time_scaling(context: BenchContext) -> Iterator[Result]:
    """Time end-to-end epochs by batch size and number of workers."""
    batch_size = context.size.batch_size
    others = [(other, context.num_workers) for other in context.size.batch_sizes if other != batch_size]
    others += [(batch_size, other) for other in context.size.workers if other != context.num_workers]
    usual = epochs(context, batch_size, context.num_workers)
    yield from context.compare("scaling", usual, *(epochs(context, *other) for other in others), unit="img/s")


def run_config(context: BenchContext, batch_size: int, **settings: Any) -> Config:
    """Return the settings of a run, compiled if a run compiles by default."""
    return context.config(num_classes=context.photos.num_classes, batch_size=batch_size, compile="auto", **settings)


def epochs(context: BenchContext, batch_size: int, num_workers: int, **settings: Any) -> Variant:
    """Return epochs of a run, one per call, through its own data, loader, prefetch and step."""
    num_images = max(1, context.size.epoch_images // batch_size) * batch_size
    config = run_config(context, batch_size, num_workers=num_workers, **settings)
    workload, state = build(context, config)
    data = context.make_train_source(
        context.photos, num_images, batch_size=batch_size, num_workers=num_workers, **settings
    )
    epoch_numbers = count(1)

    def run() -> None:
        epoch = next(epoch_numbers)
        for rank_batch in prefetch(data.train_batches(epoch), context.device):
            optim.set_learning_rates(
                state.optimizer, partial(workload.lr_schedule, state.step, epoch, data.steps_per_epoch)
            )
            train_loop.train_step(state, rank_batch, workload, config, context.ranks)

    cache_titles = {"none": "", "host": ", image cache on host", "device": ", image cache on device"}
    title = cache_titles[config.image_cache] + ", JPEG decoder on device" * (config.jpeg_decoder == "gpu")
    name = f"{config.precision}, batch {batch_size}, {num_workers} workers, {context.photos.name}{title}"
    return Variant(name, with_precision(config.precision, context, run), num_images)


def baseline_epochs(context: BenchContext) -> Variant:
    """Return epochs of the baseline."""
    batch_size = min(context.size.batch_size, BASELINE_BATCH)
    num_images = max(1, context.size.baseline_epoch_images // batch_size) * batch_size
    split = train_dataset(context.make_train_source(context.photos, num_images, num_workers=0)).split
    loader = baseline.make_loader(baseline.Samples(split), batch_size, context.num_workers, context.device)
    step = baseline.make_step(context.device, context.photos.num_classes)

    def run() -> None:
        for batch in prefetch(loader, context.device):
            step(batch)

    name = f"baseline, float32, batch {batch_size}, {context.num_workers} workers"
    return baseline_variant(context, name, run, num_images)
