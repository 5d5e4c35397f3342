"""Throughput measurements: the modes bench-train and bench-infer.

They time the steps of real runs (`train_loop.train_step`, `Workload.predict`), on the data set or on synthetic input
that is already on the device. They produce no MLPerf result and no MLPerf log.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from detection.config.settings import InputError
from detection.data.batch import RankBatch
from detection.data.prefetch import prefetch, to_device
from detection.engine import optim, train_loop
from detection.engine.initialization import build_state, warm_up
from detection.engine.metadata import run_metadata
from detection.engine.model_mode import eval_mode, set_train_mode
from detection.engine.state import RunContext, TrainState
from detection.engine.step_timer import StepTimer
from detection.engine.workload import Workload
from detection.runtime import device

T = TypeVar("T")
Floats = NDArray[np.float64]

PHASE_STEPS_DIVISOR = 4  # a quarter of the steps runs again, synchronizing the device after each phase


def benchmark_training(workload: Workload[Any], run: RunContext) -> list[dict[str, Any]]:
    """Time training steps. Print, summarize and return the metrics of each input kind."""
    start_s = time.monotonic()
    state = build_state(workload, run.config, run.ranks)
    warm_up(state, workload, run, train_loop.train_step)
    set_train_mode(state.model, run.config)
    init_s = time.monotonic() - start_s

    def step_fn(rank_batch: RankBatch[Any]) -> int:
        optim.set_learning_rates(
            state.optimizer, partial(workload.lr_schedule, state.step, 1, run.config.benchmark_steps)
        )
        train_loop.train_step(state, rank_batch, workload, run.config, run.ranks)
        return len(rank_batch.batch[0])

    def real() -> Iterator[RankBatch[Any]]:
        data = workload.make_train_source()
        return (rank_batch for epoch in itertools.count(1) for rank_batch in data.train_batches(epoch, 0))

    def synthetic() -> RankBatch[Any]:
        num_images = run.config.global_batch_size(run.ranks.world_size)
        return RankBatch(workload.dummy_batch(), num_images, run.ranks.world_size / num_images)

    return measure(step_fn, real, synthetic, workload, state, run, init_s)


def benchmark_inference(workload: Workload[Any], run: RunContext) -> list[dict[str, Any]]:
    """Time inference from batch to detections, without the COCO metric. Report as `benchmark_training` does."""
    start_s = time.monotonic()
    state = build_state(workload, run.config, run.ranks)
    init_s = time.monotonic() - start_s

    def real() -> Iterator[Any]:
        data = workload.make_eval_source()
        if data.eval_samples < run.ranks.world_size:
            raise InputError(f"{data.eval_samples} evaluation images are too few for {run.ranks.world_size} ranks")
        return (batch for _ in itertools.count() for batch in data.eval_batches())

    with eval_mode(state, run) as model:
        model.register_forward_hook(lambda *_: state.step_timer.lap("forward"))

        def step_fn(batch: Any) -> int:
            workload.predict(model, batch)
            state.step_timer.lap("detection")
            return len(batch[0])

        return measure(step_fn, real, workload.dummy_eval_batch, workload, state, run, init_s)


def measure(
    step_fn: Callable[[Any], int],
    real: Callable[[], Iterator[Any]],
    synthetic: Callable[[], Any],
    workload: Workload[Any],
    state: TrainState,
    run: RunContext,
    init_s: float,
) -> list[dict[str, Any]]:
    """Time `step_fn`, which returns its number of images, on each requested input kind.

    init_s: seconds until the first step could begin, of the summary.
    """
    config, run_device = run.config, run.ranks.device
    run.logger.start_run(run_metadata(workload, run, state))
    results = []
    for kind in ("real", "synthetic"):
        if config.benchmark_input not in ("both", kind):
            continue
        batches = (
            prefetch(real(), run_device) if kind == "real" else itertools.repeat(to_device(synthetic(), run_device))
        )
        time_steps(batches, step_fn, config.benchmark_warmup, state, run)
        timed = time_steps(batches, step_fn, config.benchmark_steps, state, run)
        state.step_timer = StepTimer(sync_device=run_device)
        time_steps(batches, step_fn, max(1, config.benchmark_steps // PHASE_STEPS_DIVISOR), state, run)
        timings = summarize_timings(gather_timings(timed, run))
        result = {"input": kind, **timings, "time_fraction": phase_fractions(state.step_timer, run)}
        state.step_timer = StepTimer()
        print_result(result, run)
        results.append(result)
    run.logger.write_summary(
        {
            **run_metadata(workload, run, state),
            "batch_size": config.batch_size if config.mode == "bench-train" else config.eval_batch_size,
            "steps": config.benchmark_steps,
            "warmup_steps": config.benchmark_warmup,
            "init_s": init_s,
            "peak_memory_gib": device.peak_memory_gib(run_device),
            "results": results,
        }
    )
    return results


def time_steps(
    batches: Iterable[T], step_fn: Callable[[T], int], count: int, state: TrainState, run: RunContext
) -> Floats:
    """Return images and seconds (count, 2) of `count` steps on this rank, data loading included."""
    rows = np.zeros((count, 2))
    state.step_timer.start()
    start_s = state.step_timer.last_s
    for row, batch in zip(rows, batches, strict=False):  # rows first, so that no extra batch is fetched
        state.step_timer.lap("data")
        num_images = step_fn(batch)
        device.synchronize(run.ranks.device)
        end_s = time.monotonic()
        row[:] = num_images, end_s - start_s
        start_s = end_s
        run.watchdog.heartbeat()
    return rows


def gather_timings(rows: Floats, run: RunContext) -> Floats:
    """Return the timings of all ranks (ranks, steps, 2)."""
    gathered = run.ranks.all_gather_rows(torch.from_numpy(rows).to(run.ranks.device)).cpu().numpy()
    return gathered.reshape(run.ranks.world_size, *rows.shape)


def summarize_timings(timed: Floats) -> dict[str, Any]:
    """Return the total throughput and the step latency of images and seconds (ranks, steps, 2).

    The average throughput is over all steps. Median, minimum and maximum are over single steps. The latency of a step
    is that of its slowest rank.
    """
    images, seconds = timed[..., 0], timed[..., 1]
    rates = (images / seconds).sum(axis=0)
    latency_ms = 1000 * seconds.max(axis=0)
    return {
        "images_per_s": {
            "average": float((images.sum(axis=1) / seconds.sum(axis=1)).sum()),
            "median": float(np.median(rates)),
            "min": float(rates.min()),
            "max": float(rates.max()),
        },
        "latency_ms": {
            "average": float(latency_ms.mean()),
            "median": float(np.median(latency_ms)),
            "p95": float(np.quantile(latency_ms, 0.95)),
            "max": float(latency_ms.max()),
        },
    }


def phase_fractions(timer: StepTimer, run: RunContext) -> dict[str, float]:
    """Return the fraction of time in each phase, 0 to 1, averaged over ranks."""
    elapsed_s = torch.tensor(list(timer.elapsed_s.values()), dtype=torch.float64, device=run.ranks.device)
    fractions = run.ranks.all_gather_rows((elapsed_s / elapsed_s.sum())[None]).mean(dim=0).tolist()
    return dict(zip(timer.elapsed_s, fractions, strict=True))


def print_result(result: dict[str, Any], run: RunContext) -> None:
    """Print the metrics of one input kind."""
    config, emit = run.config, run.logger.print
    emit(f"{config.mode}, {result['input']} input: {config.benchmark_steps} steps after {config.benchmark_warmup}")
    for title, name in (("img/s", "images_per_s"), ("ms a step", "latency_ms")):
        emit(f"  {title:<10}" + "  ".join(f"{key} {value:.1f}" for key, value in result[name].items()))
    emit(
        f"  {'time in':<10}"
        + "  ".join(f"{phase} {fraction:.1%}" for phase, fraction in result["time_fraction"].items())
    )
