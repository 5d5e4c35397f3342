"""Check a run of SSD300 before its clock starts: `detection.preflight.run_checks`, with what is SSD300's."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from detection.preflight import run_checks
from ssd.config import Config, load

IMAGE_BYTES = 3 * 300 * 300


def main(argv: Sequence[str]) -> int:
    """Run all checks and return the exit status."""
    return run_checks.main(argv, CHECKS)


def recipe(config: Config, world_size: int) -> Mapping[str, object]:
    """What the rules are about."""
    return config.hyperparameters(world_size) | {"target": config.target}


def network(path: Path, config: Config) -> str:
    """What a checkpoint holds; raises InputError where it is not of the network of the settings."""
    from ssd import weights  # with torch, which only this check needs

    found = weights.read(path)
    weights.check(found, weights.wanted(config), path)
    return f"{found.origin}; {weights.network_of(found.state)}"


def layers(config: Config) -> str:
    """The layers of the network of the settings."""
    from detection.engine import model_summary
    from ssd.model import make_model

    return model_summary.describe(make_model, config)


CHECKS = run_checks.Checks(load=load, recipe=recipe, image_bytes=lambda _: IMAGE_BYTES, network=network, layers=layers)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
