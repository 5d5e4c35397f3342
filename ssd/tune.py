"""Find the fastest settings of SSD300 on this machine: `detection.tuning.search`, with what is SSD300's."""

import sys

from detection.tuning import search
from mlperf.recipes import Recipe
from ssd.config import PREFIX
from ssd.preflight import CHECKS


def main(argv: list[str]) -> int:
    """Measure, and write the config file; returns the exit status."""
    return search.main(argv, search.Subject("ssd.train", PREFIX, CHECKS, settings))


def settings(recipe: Recipe) -> dict[str, str]:
    """A recipe under the names of the settings."""
    tenths = 10 + recipe.stretch
    return {
        "base_lr": f"{recipe.base_lr:g}",
        "lr_round_to": f"{recipe.lr_round_to:g}",
        "warmup_steps": str(recipe.warmup_steps),
        "weight_decay": f"{recipe.weight_decay:g}",
        "lr_decay_epochs": f"{4 * tenths},{5 * tenths}",
        "max_samples": str(recipe.max_samples),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
