"""Find the fastest settings of Mask R-CNN on this machine: `detection.tuning.search`, with what is Mask R-CNN's."""

import sys

from detection.tuning import search
from maskrcnn.config import PREFIX
from maskrcnn.preflight import CHECKS
from mlperf.recipes import Recipe


def main(argv: list[str]) -> int:
    """Measure, and write the config file; returns the exit status."""
    return search.main(argv, search.Subject("maskrcnn.train", PREFIX, CHECKS, settings))


def settings(recipe: Recipe) -> dict[str, str]:
    """A recipe under the names of the settings."""
    tenths = 10 + recipe.stretch
    return {
        "base_lr": f"{recipe.base_lr:g}",
        "lr_round_to": f"{recipe.lr_round_to:g}",
        "warmup_steps": str(recipe.warmup_steps),
        "lr_decay_images": f"{96_000 * tenths},{128_000 * tenths}",
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
