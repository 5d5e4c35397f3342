"""Recipes that were published for a global batch, as data, and what lies between them.

Sources: the logs and config files of NVIDIA's and Inspur's submissions to MLPerf training 0.7 and 1.1, and, named
reference points, the runs that mlperf_logging's rcp_checker holds submissions to (rcps_*.json of 1.0 and 1.1; where
those of 1.1 give ten times the learning rate of 1.0, it is that of 1.0).
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mlperf import rules


@dataclass(frozen=True)
class Recipe:
    """A recipe for a global batch, in the units of the settings.

    base_lr: per 32 images for SSD, per 16 for Mask R-CNN. stretch: tenths by which the decay comes later than the
    rule's least, its K. lr_round_to: the peak was rounded to one; 0: it was not. max_samples: of SSD.
    """

    global_batch_size: int
    base_lr: float
    warmup_steps: int
    weight_decay: float
    stretch: int
    source: str
    lr_round_to: float = 0.0
    max_samples: int = 1


PUBLISHED: Mapping[str, tuple[Recipe, ...]] = {
    "ssd": (
        Recipe(32, 2.5e-3, 300, 5e-4, 1, "the reference's own recipe"),
        Recipe(896, 3.2e-3, 650, 1.3e-4, 1, "NVIDIA's two DGX A100 in 0.7", lr_round_to=2.5e-3),
        Recipe(912, 3.2e-3, 650, 1.3e-4, 1, "NVIDIA's DGX A100 in 1.1", lr_round_to=2.5e-3),
        Recipe(960, 2.92e-3, 650, 1.6e-4, 1, "NVIDIA's DGX-1 in 0.7", lr_round_to=2.5e-3),
        Recipe(1024, 2.5e-3, 300, 5e-4, 0, "the reference point of 1024", max_samples=50),
        Recipe(1536, 2.5e-3, 200, 1.3e-4, 1, "the reference point of 1536", max_samples=50),
        Recipe(2048, 4.57e-3, 1489, 4e-5, 5, "the reference point of 2048", max_samples=50),
        Recipe(4096, 2.5e-3, 1145, 4e-5, 10, "the reference point of 4096", max_samples=50),
    ),
    "maskrcnn": (
        Recipe(48, 0.02, 625, 1e-4, 2, "the submissions of 48 images a step", lr_round_to=0.02),
        Recipe(64, 0.02, 800, 1e-4, 2, "the submissions of 64 images a step", lr_round_to=0.02),
        Recipe(96, 0.02, 625, 1e-4, 2, "the submissions of 96 images a step", lr_round_to=0.02),
        Recipe(128, 0.02, 625, 1e-4, 2, "the reference point of 128", lr_round_to=0.02),
        Recipe(256, 0.015, 1800, 1e-4, 5, "the reference point of 256", lr_round_to=0.02),
    ),
}


def recipe(benchmark: str, global_batch_size: int) -> Recipe:
    """The recipe for a global batch: the published one, or what lies between its neighbours by the batch's logarithm.

    Beyond the ends it is that of the end. Its source says what it was taken from.
    """
    published = PUBLISHED[benchmark]
    nearest = min(published, key=lambda one: abs(math.log(one.global_batch_size / global_batch_size)))
    if nearest.global_batch_size == global_batch_size:
        return nearest
    least, most = published[0].global_batch_size, published[-1].global_batch_size
    if not least < global_batch_size < most:
        source = f"{nearest.source}, for {nearest.global_batch_size} images a step the nearest"
        return replace(nearest, global_batch_size=global_batch_size, source=source)
    low, high = next(pair for pair in itertools.pairwise(published) if pair[1].global_batch_size > global_batch_size)
    share = math.log(global_batch_size / low.global_batch_size) / math.log(
        high.global_batch_size / low.global_batch_size
    )

    def between(one: float, other: float) -> float:
        return one + share * (other - one)

    return Recipe(
        global_batch_size,
        base_lr=float(f"{between(low.base_lr, high.base_lr):.3g}"),
        warmup_steps=round(between(low.warmup_steps, high.warmup_steps)),
        weight_decay=float(f"{between(low.weight_decay, high.weight_decay):.2g}"),
        stretch=round(between(low.stretch, high.stretch)),
        source=f"between {low.source} ({low.global_batch_size}) and {high.source} ({high.global_batch_size})",
        lr_round_to=nearest.lr_round_to,
        max_samples=nearest.max_samples,
    )


def reference_epochs(benchmark: str, ruleset: str, global_batch_size: int) -> float | None:
    """Epochs in which the reference comes to its target with a global batch, as the checker draws its line.

    Below the smallest of its points it is that point's; None above the largest. Ruleset 0.7.0 has no points: those of
    1.0.0 stand for them.
    """
    named = ruleset if ruleset != "0.7.0" else "1.0.0"
    points = [p for p in rules.BENCHMARKS[benchmark].reference_points if named in p.rulesets and not p.pruned]
    if global_batch_size <= points[0].global_batch_size:
        return points[0].mean_epochs
    for low, high in itertools.pairwise(points):
        if global_batch_size <= high.global_batch_size:
            share = (global_batch_size - low.global_batch_size) / (high.global_batch_size - low.global_batch_size)
            return low.mean_epochs + share * (high.mean_epochs - low.mean_epochs)
    return None
