"""Whether the machines of a run of Mask R-CNN are ready for it: `detection.preflight.machine_checks`, with what is Mask R-CNN's."""

import sys

from detection.engine import entrypoint
from detection.engine.train_loop import Benchmark
from detection.preflight import machine_checks
from detection.runtime.distributed import Ranks
from maskrcnn.config import Config
from maskrcnn.data import Batch
from maskrcnn.evaluator import Evaluation
from maskrcnn.model import make_model
from maskrcnn.preflight import CHECKS
from maskrcnn.train import detect, make_benchmark


def main(argv: list[str]) -> int:
    """Inspect on this rank; returns the exit status."""
    return machine_checks.main(argv, CHECKS, benchmark)


def benchmark(config: Config, ranks: Ranks) -> Benchmark[Batch]:
    """Mask R-CNN with random weights, as the loop sees it."""
    return make_benchmark(config, ranks, 0, make_model(config), Evaluation(config, ranks, detect))


if __name__ == "__main__":
    entrypoint.end(main(sys.argv[1:]))
