"""Command line of the programs of this package that measure one thing and write it to a file."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def parse(argv: Sequence[str], name: str, description: str | None) -> argparse.Namespace:
    """Parse the command line of `perf.accelerator.NAME`. An invalid flag ends the process with status 2."""
    parser = argparse.ArgumentParser(prog=f"python -m perf.accelerator.{name}", description=description)
    parser.add_argument("file", type=Path, help="file to write, in JSON")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rehearse", action="store_true", help="measure with small sizes")
    return parser.parse_args(argv)
