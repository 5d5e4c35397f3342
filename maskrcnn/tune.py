"""Search for the fastest settings of Mask R-CNN on this machine, by `detection.tuning.search`."""

import sys

from detection.tuning import search
from maskrcnn.config import PREFIX
from maskrcnn.preflight import CHECKS
from mlperf.recipes import Recipe


def main(argv: list[str]) -> int:
    """Search, write the config file and return the exit status."""
    return search.main(argv, search.TuneTarget("maskrcnn.train", PREFIX, CHECKS, recipe_settings))


def recipe_settings(recipe: Recipe) -> dict[str, str]:
    """Return a recipe as settings."""
    decay_tenths = 10 + recipe.decay_k
    return {
        "base_lr": f"{recipe.base_lr:g}",
        "lr_round_to": f"{recipe.lr_round_to:g}",
        "warmup_steps": str(recipe.warmup_steps),
        "lr_decay_images": f"{96_000 * decay_tenths},{128_000 * decay_tenths}",
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
