"""Check a run of Mask R-CNN before its clock starts: `detection.preflight.run_checks`, with what is Mask R-CNN's."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from detection.preflight import run_checks
from maskrcnn.config import Config, load


def main(argv: Sequence[str]) -> int:
    """Run all checks and return the exit status."""
    return run_checks.main(argv, CHECKS)


def recipe(config: Config, world_size: int) -> Mapping[str, object]:
    """What the rules are about."""
    return config.hyperparameters(world_size) | {"target": config.target, "mask_target": config.mask_target}


def image_bytes(config: Config) -> int:
    """Of the largest image as workers hand it over, padded.

    Sides are multiples of 32, and where batches are not grouped by shape the short side of one image may be padded to
    the long side of another.
    """
    short, long = (-(-size // 32) * 32 for size in (config.min_image_size, config.max_image_size))
    return 3 * long * (short if config.group_by_aspect_ratio else long)


def network(path: Path, config: Config) -> str:
    """What a checkpoint holds; raises InputError where it is not of the network of the settings."""
    from maskrcnn import weights  # with torch, which only this check needs

    found = weights.read(path)
    weights.check(found, config, path)
    return f"{found.origin}; {config.network_name} for {weights.num_classes(found.state)} classes"


def layers(config: Config) -> str:
    """The layers of the network of the settings."""
    from detection.engine import model_summary
    from maskrcnn.model import make_model

    return model_summary.describe(make_model, config)


CHECKS = run_checks.Checks(
    load=load, recipe=recipe, image_bytes=image_bytes, network=network, layers=layers, segmentations=True
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
