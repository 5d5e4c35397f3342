"""Reference convergence points (RCPs) of a ruleset, which mlperf_logging's RCP checker computes from reference runs."""

from dataclasses import dataclass
from functools import cache

from mlperf.requirements import package_dir


@dataclass(frozen=True)
class ReferencePoint:
    """Reference convergence point.

    global_batch_size: images per step. mean_epochs: epochs to the target, without the fastest and the slowest run.
    min_epochs: minimum mean of a submission. pruned: the checker drops the point, because it converges slower than
    the line between its neighbors or slower than a larger batch.
    """

    global_batch_size: int
    mean_epochs: float
    min_epochs: float
    pruned: bool


@cache
def read(ruleset: str, name: str) -> tuple[ReferencePoint, ...]:
    """Return the points of a benchmark by global batch size. Ruleset 0.7.0 has none. name: in that ruleset."""
    if not (package_dir() / "rcp_checker" / f"training_{ruleset}" / f"rcps_{name}.json").is_file():
        return ()
    from mlperf_logging.rcp_checker.rcp_checker import RCP_Checker  # takes 1.5 s, with scipy.stats

    checker = RCP_Checker("training", ruleset, name, verbose=False)
    return tuple(
        ReferencePoint(
            point["BS"], float(point["RCP Mean"]), float(point["Min Epochs"]), key not in checker.pruned_rcp_data
        )
        for key, point in checker.rcp_data.items()
    )
