"""Whether the machines of a run of SSD300 are ready for it: `detection.preflight.machine_checks`, with what is SSD300's."""

import sys

from detection.engine import entrypoint
from detection.engine.train_loop import Benchmark
from detection.preflight import machine_checks
from detection.runtime.distributed import Ranks
from ssd.config import Config
from ssd.data import Batch
from ssd.evaluator import Evaluation
from ssd.model import make_model
from ssd.preflight import CHECKS
from ssd.train import make_benchmark


def main(argv: list[str]) -> int:
    """Inspect on this rank; returns the exit status."""
    return machine_checks.main(argv, CHECKS, benchmark)


def benchmark(config: Config, ranks: Ranks) -> Benchmark[Batch]:
    """SSD300 with random weights, as the loop sees it."""
    return make_benchmark(config, ranks, 0, make_model(config), Evaluation(config, ranks))


if __name__ == "__main__":
    entrypoint.end(main(sys.argv[1:]))
