"""Preflight checks of a Mask R-CNN run, by `detection.preflight.run_checks`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from detection.preflight import run_checks
from maskrcnn.config import Config, load


def main(argv: Sequence[str]) -> int:
    """Run all checks and return the exit status."""
    return run_checks.main(argv, CHECKS)


def rule_values(config: Config, world_size: int) -> Mapping[str, object]:
    """Return the values that the MLPerf rules constrain."""
    return config.hyperparameters(world_size) | {"target": config.target, "mask_target": config.mask_target}


def image_bytes(config: Config) -> int:
    """Return the size in bytes of the largest padded image that a worker passes on.

    Sides are multiples of 32. Without aspect-ratio groups, the short side of one image may be padded to the long side
    of another.
    """
    short, long = (-(-size // 32) * 32 for size in (config.min_image_size, config.max_image_size))
    return 3 * long * (short if config.group_by_aspect_ratio else long)


def describe_checkpoint(path: Path, config: Config) -> str:
    """Describe a file of weights; raise InputError unless it fits the network of the settings."""
    from maskrcnn import weights  # imports torch, which only this check needs

    content = weights.read(path)
    weights.check_compatible(content, config, path)
    return f"{content.origin}; {config.network_name} for {weights.num_classes(content.state)} classes"


def summarize_layers(config: Config) -> str:
    """Return a table of the network's layers."""
    from detection.engine import model_summary
    from maskrcnn.model import make_model

    return model_summary.summarize_model(make_model, config)


CHECKS = run_checks.PreflightSpec(
    load=load,
    rule_values=rule_values,
    image_bytes=image_bytes,
    check_weights=describe_checkpoint,
    summarize_model=summarize_layers,
    segmentations=True,
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
