"""How fast this machine trains and evaluates: the modes bench-train and bench-infer.

The steps are the loop's own (`engine.train_step`, the benchmark's `detect`), on the data that a run has, or on noise
that is on the device already. Nothing of it is an MLPerf result, and no MLPerf log is written.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from detection.config.settings import InputError
from detection.data.batch import Share
from detection.data.prefetch import move, prefetch
from detection.engine import train_loop
from detection.engine.state import Run, State
from detection.engine.step_timer import Phases
from detection.engine.train_loop import Benchmark
from detection.runtime import device

T = TypeVar("T")
Floats = NDArray[np.float64]

PHASE_STEPS = 4  # a quarter of the steps is made again, waiting for the device at the end of each phase


def training(benchmark: Benchmark[Any], run: Run) -> list[dict[str, Any]]:
    """Measure training steps; the figures of each kind of input, printed and in the summary."""
    state = train_loop.build(benchmark, run.config, run.ranks)
    train_loop.warm_up(state, benchmark, run)
    train_loop.set_training(state.model, run.config)

    def work(share: Share[Any]) -> int:
        lr = benchmark.learning_rate(state.step, 1)
        train_loop.train_step(state, share, lr, benchmark, run.config, run.ranks)
        return len(share.batch[0])

    def real() -> Iterator[Share[Any]]:
        data = benchmark.open_data()
        return (share for epoch in itertools.count(1) for share in data.shares(epoch, 0))

    def made_up() -> Share[Any]:
        num_images = run.config.global_batch_size(run.ranks.world_size)
        return Share(benchmark.made_up_batch(), num_images, run.ranks.world_size / num_images)

    return measure(work, real, made_up, benchmark, state, run)


def inference(benchmark: Benchmark[Any], run: Run) -> list[dict[str, Any]]:
    """Measure evaluation, but for the metric: batch to detections; the figures as in `training`."""
    state = train_loop.build(benchmark, run.config, run.ranks)

    def real() -> Iterator[Any]:
        data = benchmark.open_eval_data()
        if data.eval_samples < run.ranks.world_size:
            raise InputError(f"{data.eval_samples} evaluation images are too few for {run.ranks.world_size} ranks")
        return (batch for _ in itertools.count() for batch in data.eval_batches())

    with train_loop.evaluating(state, run) as model:
        model.register_forward_hook(lambda *_: state.phases.end("forward"))

        def work(batch: Any) -> int:
            benchmark.detect(model, batch)
            state.phases.end("detection")
            return len(batch[0])

        return measure(work, real, benchmark.made_up_eval_batch, benchmark, state, run)


def measure(
    work: Callable[[Any], int],
    real: Callable[[], Iterator[Any]],
    made_up: Callable[[], Any],
    benchmark: Benchmark[Any],
    state: State,
    run: Run,
) -> list[dict[str, Any]]:
    """Time `work`, which returns its number of images, on each kind of input that was asked for."""
    config, on = run.config, run.ranks.device
    run.progress.start_clock(train_loop.facts(benchmark, run, state))
    results = []
    for kind in ("real", "synthetic"):
        if config.benchmark_input not in ("both", kind):
            continue
        batches = prefetch(real(), on) if kind == "real" else itertools.repeat(move(made_up(), on))
        steps(batches, work, config.benchmark_warmup, state, run)
        timed = steps(batches, work, config.benchmark_steps, state, run)
        state.phases = Phases(wait_for=on)
        steps(batches, work, max(1, config.benchmark_steps // PHASE_STEPS), state, run)
        result = {"input": kind, **figures(over_ranks(timed, run)), "share": shares(state.phases, run)}
        state.phases = Phases()
        show(result, run)
        results.append(result)
    run.progress.summarise(
        {
            **train_loop.facts(benchmark, run, state),
            "batch_size": config.batch_size if config.mode == "bench-train" else config.eval_batch_size,
            "steps": config.benchmark_steps,
            "warmup_steps": config.benchmark_warmup,
            "results": results,
        }
    )
    return results


def steps(batches: Iterable[T], work: Callable[[T], int], count: int, state: State, run: Run) -> Floats:
    """Images and seconds (count, 2) of so many steps on this rank, each from asking for its batch to its end."""
    rows = np.zeros((count, 2))
    state.phases.begin()
    start_s = state.phases.mark_s
    for row, batch in zip(rows, batches, strict=False):  # the rows first: no batch is taken that is not used
        state.phases.end("data")
        num_images = work(batch)
        device.synchronize(run.ranks.device)
        end_s = time.monotonic()
        row[:] = num_images, end_s - start_s
        start_s = end_s
        run.watchdog.beat()
    return rows


def over_ranks(rows: Floats, run: Run) -> Floats:
    """What every rank measured, (ranks, steps, 2)."""
    gathered = run.ranks.gather_rows(torch.from_numpy(rows).to(run.ranks.device)).cpu().numpy()
    return gathered.reshape(run.ranks.world_size, *rows.shape)


def figures(timed: Floats) -> dict[str, Any]:
    """Throughput of all ranks together and latency of a step, of images and seconds (ranks, steps, 2).

    The average throughput is of all images and all the time; median, least and greatest are of single steps. A step
    takes as long as on its slowest rank.
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


def shares(phases: Phases, run: Run) -> dict[str, float]:
    """The share of each phase in the time of all, 0 to 1, the mean over ranks."""
    spent_s = torch.tensor(list(phases.spent_s.values()), dtype=torch.float64, device=run.ranks.device)
    share = run.ranks.gather_rows((spent_s / spent_s.sum())[None]).mean(dim=0).tolist()
    return dict(zip(phases.spent_s, share, strict=True))


def show(result: dict[str, Any], run: Run) -> None:
    """Print the figures of one kind of input."""
    config, say = run.config, run.progress.say
    say(f"{config.mode}, {result['input']} input: {config.benchmark_steps} steps after {config.benchmark_warmup}")
    for title, name in (("img/s", "images_per_s"), ("ms a step", "latency_ms")):
        say(f"  {title:<10}" + "  ".join(f"{key} {value:.1f}" for key, value in result[name].items()))
    say(f"  {'time in':<10}" + "  ".join(f"{phase} {share:.1%}" for phase, share in result["share"].items()))
