"""Search for the fastest settings on this machine: SSD300's part of `detection.tuning.search`."""

import sys

from detection.tuning import search
from mlperf.recipes import Recipe
from ssd.config import PREFIX
from ssd.preflight import CHECKS


def main(argv: list[str]) -> int:
    """Measure settings, write the config file and return the exit status."""
    return search.main(argv, search.TuneTarget("ssd.train", PREFIX, CHECKS, recipe_settings))


def recipe_settings(recipe: Recipe) -> dict[str, str]:
    """Convert a recipe to settings by name."""
    decay_tenths = 10 + recipe.decay_k
    return {
        "base_lr": f"{recipe.base_lr:g}",
        "lr_round_to": f"{recipe.lr_round_to:g}",
        "warmup_steps": str(recipe.warmup_steps),
        "weight_decay": f"{recipe.weight_decay:g}",
        "lr_decay_epochs": f"{4 * decay_tenths},{5 * decay_tenths}",
        "max_samples": str(recipe.max_samples),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
