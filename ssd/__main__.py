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


EXPORT_INTERFACE = """\
    input   images  (B, 3, 300, 300) uint8 RGB, the whole image resized, without other preprocessing
    output  boxes   (B, D, 4) float32: left, top, right, bottom as fractions of width and height, not clipped
            labels  (B, D) int64: 1, 2, ... by the categories in the file, 0 without a detection
            scores  (B, D) float32, descending, 0 without a detection
"""

COMMANDS = cli.CommandSet("ssd", "SSD300", declare, train, predict, (0.3, 8), export, conformance, EXPORT_INTERFACE)

if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(cli.main(sys.argv[1:], COMMANDS))
