"""Checks of the machines of an SSD300 run: SSD300's part of `detection.preflight.machine_checks`."""

import sys

from detection.engine import entrypoint
from detection.engine.workload import Workload
from detection.preflight import machine_checks
from detection.runtime.distributed import DistContext
from ssd.config import Config
from ssd.data import Batch
from ssd.evaluator import SSDEvaluator
from ssd.model import make_model
from ssd.preflight import CHECKS
from ssd.train import make_workload


def main(argv: list[str]) -> int:
    """Check this rank's machine and return the exit status."""
    return machine_checks.main(argv, CHECKS, make_random_workload)


def make_random_workload(config: Config, ranks: DistContext) -> Workload[Batch]:
    """Assemble SSD300 with random weights for the training loop."""
    return make_workload(config, ranks, 0, make_model(config), SSDEvaluator(config, ranks))


if __name__ == "__main__":
    entrypoint.hard_exit(main(sys.argv[1:]))
