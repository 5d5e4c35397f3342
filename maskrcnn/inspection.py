"""Machine checks of a Mask R-CNN run, by `detection.preflight.machine_checks`."""

import sys

from detection.engine import entrypoint
from detection.engine.workload import Workload
from detection.preflight import machine_checks
from detection.runtime.distributed import DistContext
from maskrcnn.config import Config
from maskrcnn.data import Batch
from maskrcnn.evaluator import MaskRCNNEvaluator
from maskrcnn.model import make_model
from maskrcnn.preflight import CHECKS
from maskrcnn.train import make_workload, predict


def main(argv: list[str]) -> int:
    """Check this rank and return the exit status."""
    return machine_checks.main(argv, CHECKS, make_random_workload)


def make_random_workload(config: Config, ranks: DistContext) -> Workload[Batch]:
    """Build the workload with random weights."""
    return make_workload(config, ranks, 0, make_model(config), MaskRCNNEvaluator(config, ranks, predict))


if __name__ == "__main__":
    entrypoint.hard_exit(main(sys.argv[1:]))
