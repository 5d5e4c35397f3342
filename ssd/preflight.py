"""Checks of an SSD300 run before its clock starts: SSD300's part of `detection.preflight.run_checks`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from detection.preflight import run_checks
from ssd.config import Config, load

IMAGE_BYTES = 3 * 300 * 300


def main(argv: Sequence[str]) -> int:
    """Run all checks and return the exit status."""
    return run_checks.main(argv, CHECKS)


def rule_values(config: Config, world_size: int) -> Mapping[str, object]:
    """Return the values that MLPerf's rules constrain."""
    return config.hyperparameters(world_size) | {"target": config.target}


def describe_checkpoint(path: Path, config: Config) -> str:
    """Describe a checkpoint. Raise InputError if it does not fit the network of the settings."""
    from ssd import weights  # imports torch, which only this check needs

    loaded = weights.read(path)
    weights.check_compatible(loaded, weights.expected_state(config), path)
    return f"{loaded.origin}; {weights.infer_network(loaded.state)}"


def summarize_layers(config: Config) -> str:
    """Summarize the layers of the settings' network."""
    from detection.engine import model_summary
    from ssd.model import make_model

    return model_summary.summarize_model(make_model, config)


CHECKS = run_checks.PreflightSpec(
    load=load,
    rule_values=rule_values,
    image_bytes=lambda _: IMAGE_BYTES,
    check_weights=describe_checkpoint,
    summarize_model=summarize_layers,
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
