"""Commands of SSD300: python -m ssd COMMAND."""

import sys
from argparse import Namespace
from typing import Any

from detection import cli
from mlperf import stdio


def declare() -> Any:
    """Return the declarations for the shared commands."""
    from ssd import commands

    return commands


def train(argv: list[str]) -> int:
    """Train on this rank."""
    from ssd.train import main

    return main(argv)


def predict(arguments: Namespace) -> int:
    """Detect objects on images."""
    from ssd.predict import main

    return main(arguments)


def export(arguments: Namespace) -> int:
    """Export a trained network."""
    from ssd.export import main

    return main(arguments)


def conformance(arguments: Namespace) -> int:
    """Compare with the MLPerf reference."""
    from ssd.conformance import SUITE

    return SUITE.run(arguments)


COMMANDS = cli.CommandSet("ssd", "SSD300", declare, train, predict, (0.3, 8), export, conformance)

if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(cli.main(sys.argv[1:], COMMANDS))
