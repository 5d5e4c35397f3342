"""Commands of RetinaNet: python -m retinanet COMMAND."""

import sys
from argparse import Namespace
from typing import Any

from detection import cli


def declare() -> Any:
    """Return the declarations for the shared commands."""
    from retinanet import commands

    return commands


def train(argv: list[str]) -> int:
    """Train on this rank."""
    from retinanet.train import main

    return main(argv)


def predict(arguments: Namespace) -> int:
    """Detect objects on images."""
    from retinanet.predict import main

    return main(arguments)


def conformance(arguments: Namespace) -> int:
    """Compare with the MLPerf reference."""
    from retinanet.conformance import SUITE

    return SUITE.run(arguments)


COMMANDS = cli.CommandSet("retinanet", "RetinaNet", declare, train, predict, (0.3, 4), conformance=conformance)

if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[1:], COMMANDS))
