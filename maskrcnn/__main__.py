"""Commands of Mask R-CNN: python -m maskrcnn COMMAND."""

import sys
from argparse import Namespace
from typing import Any

from detection import cli
from mlperf import stdio


def declare() -> Any:
    """Return the declarations for the shared commands."""
    from maskrcnn import commands

    return commands


def train(argv: list[str]) -> int:
    """Train on this rank."""
    from maskrcnn.train import main

    return main(argv)


def predict(arguments: Namespace) -> int:
    """Detect objects on images."""
    from maskrcnn.predict import main

    return main(arguments)


def conformance(arguments: Namespace) -> int:
    """Compare with the MLPerf reference."""
    from maskrcnn.conformance import SUITE

    return SUITE.run(arguments)


COMMANDS = cli.CommandSet("maskrcnn", "Mask R-CNN", declare, train, predict, (0.5, 4), conformance=conformance)

if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(cli.main(sys.argv[1:], COMMANDS))
