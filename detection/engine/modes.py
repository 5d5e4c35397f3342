"""What --mode asks for."""

from collections.abc import Callable
from typing import Any

from detection.engine import throughput, train_loop
from detection.engine.state import Run
from detection.engine.train_loop import Benchmark, Outcome


def do(benchmark: Benchmark[Any], run: Run, log_recipe: Callable[[], None]) -> Outcome | None:
    """Do what the mode of the run says; returns how it ended, or None where it only measured how fast it is.

    log_recipe: says in the MLPerf log what the run is made of; called where a run begins.
    """
    match run.config.mode:
        case "train":
            if not run.continues:
                log_recipe()
            return train_loop.train_to_target(benchmark, run)
        case "evaluate":
            return train_loop.evaluate_only(benchmark, run)
        case "bench-train":
            throughput.training(benchmark, run)
        case "bench-infer":
            throughput.inference(benchmark, run)
    return None
