"""Published recipes by global batch, and interpolation between them.

Sources: the logs and config files of submissions to MLPerf Training 0.7 to 5.1, and the reference points, which are the
runs in mlperf_logging's rcp_checker (rcps_*.json). Where SSD's points of 1.1 give ten times the learning rate of 1.0,
the value of 1.0 is used. RetinaNet has the submissions' recipe where it took fewer epochs than the reference point.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mlperf import rules


@dataclass(frozen=True)
class Recipe:
    """Recipe for a global batch, in the units of the settings.

    base_lr: per 32 images for SSD, per 16 for Mask R-CNN, for all images for RetinaNet. warmup: steps, or epochs for
    RetinaNet. decay_k: the rule's K, tenths by which the decay is later than its minimum; RetinaNet has no decay.
    lr_round_to: the peak is rounded to a multiple of it, or not at all if 0. max_samples: SSD only.
    """

    global_batch_size: int
    base_lr: float
    warmup: int
    weight_decay: float
    decay_k: int
    source: str
    lr_round_to: float = 0.0
    max_samples: int = 1


PUBLISHED_RECIPES: Mapping[str, tuple[Recipe, ...]] = {
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
        Recipe(48, 0.02, 625, 1e-4, 2, "the submissions with 48 images per step", lr_round_to=0.02),
        Recipe(64, 0.02, 800, 1e-4, 2, "the submissions with 64 images per step", lr_round_to=0.02),
        Recipe(96, 0.02, 625, 1e-4, 2, "the submissions with 96 images per step", lr_round_to=0.02),
        Recipe(128, 0.02, 625, 1e-4, 2, "the reference point of 128", lr_round_to=0.02),
        Recipe(256, 0.015, 1800, 1e-4, 5, "the reference point of 256", lr_round_to=0.02),
    ),
    "retinanet": (
        Recipe(64, 6e-5, 0, 0, 0, "Dell's four L40S in 4.0"),
        Recipe(96, 9.5e-5, 0, 0, 0, "tinycorp's six accelerators in 5.0"),
        Recipe(128, 8.5e-5, 0, 0, 0, "the submissions with 128 images per step"),
        Recipe(256, 8.5e-5, 0, 0, 0, "the submissions with 256 images per step"),
        Recipe(320, 8.5e-5, 0, 0, 0, "the submissions with 320 images per step"),
        Recipe(512, 8.5e-5, 0, 0, 0, "the submissions with 512 images per step"),
        Recipe(768, 1.3e-4, 1, 0, 0, "the reference point of 768"),
        Recipe(1024, 1.1e-4, 1, 0, 0, "the reference point of 1024"),
        Recipe(1280, 1.3e-4, 1, 0, 0, "the reference point of 1280"),
        Recipe(2048, 1.35e-4, 1, 0, 0, "the reference point of 2048"),
        Recipe(2560, 1.45e-4, 1, 0, 0, "the reference point of 2560"),
        Recipe(4096, 1e-4, 1, 0, 0, "the reference point of 4096"),
    ),
}


def interpolate_recipe(benchmark: str, global_batch_size: int) -> Recipe:
    """Return the published recipe for a global batch, or interpolate its neighbors in log(batch).

    Beyond the smallest and largest published batch, the nearest recipe applies. `source` names the origin.
    """
    published = PUBLISHED_RECIPES[benchmark]
    nearest = min(published, key=lambda recipe: abs(math.log(recipe.global_batch_size / global_batch_size)))
    if nearest.global_batch_size == global_batch_size:
        return nearest
    smallest, largest = published[0].global_batch_size, published[-1].global_batch_size
    if not smallest < global_batch_size < largest:
        source = f"{nearest.source}, the nearest, for {nearest.global_batch_size} images per step"
        return replace(nearest, global_batch_size=global_batch_size, source=source)
    low, high = next(pair for pair in itertools.pairwise(published) if pair[1].global_batch_size > global_batch_size)
    fraction = math.log(global_batch_size / low.global_batch_size) / math.log(
        high.global_batch_size / low.global_batch_size
    )

    def interpolate(start: float, end: float) -> float:
        return start + fraction * (end - start)

    return Recipe(
        global_batch_size,
        base_lr=float(f"{interpolate(low.base_lr, high.base_lr):.3g}"),
        warmup=round(interpolate(low.warmup, high.warmup)),
        weight_decay=float(f"{interpolate(low.weight_decay, high.weight_decay):.2g}"),
        decay_k=round(interpolate(low.decay_k, high.decay_k)),
        source=f"between {low.source} ({low.global_batch_size}) and {high.source} ({high.global_batch_size})",
        lr_round_to=nearest.lr_round_to,
        max_samples=nearest.max_samples,
    )


def reference_epochs(benchmark: str, ruleset: str, global_batch_size: int) -> float | None:
    """Return the reference's epochs to the target for a global batch, interpolated linearly as the RCP checker does.

    Below the smallest point, that point applies. Above the largest, the result is None. Ruleset 0.7.0 has no points
    and uses those of 1.0.0.
    """
    points = [point for point in rules.nearest_reference_points(benchmark, ruleset) if not point.pruned]
    if global_batch_size <= points[0].global_batch_size:
        return points[0].mean_epochs
    for low, high in itertools.pairwise(points):
        if global_batch_size <= high.global_batch_size:
            fraction = (global_batch_size - low.global_batch_size) / (high.global_batch_size - low.global_batch_size)
            return low.mean_epochs + fraction * (high.mean_epochs - low.mean_epochs)
    return None
