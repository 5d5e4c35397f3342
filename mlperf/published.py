"""Published results of other systems, with their sources."""

from dataclasses import dataclass

_LOGS = "result logs of MLPerf Training {}, mlcommons/training_results_{}"
_V07, _V11 = _LOGS.format("v0.7", "v0.7"), _LOGS.format("v1.1", "v1.1")


@dataclass(frozen=True)
class PublishedResult:
    """One published result of the closed division, or a vendor's own number.

    minutes: the score, the mean of five runs without the fastest and the slowest. None if it was not published.
    images_per_s: training images over the median epoch time of all accelerators, evaluation excluded.
    epochs: epochs to the target in the published logs, if they were read.
    """

    benchmark: str
    system: str
    minutes: float | None
    images_per_s: float
    global_batch_size: int | None
    epochs: int | None
    source: str


PUBLISHED_RESULTS = (
    PublishedResult("ssd", "NVIDIA DGX-1, 8×V100", 20.69, 4811, 960, 50, _V07),
    PublishedResult("ssd", "NVIDIA, 8×A100-40", 10.21, 9818, 912, None, _V07),
    PublishedResult("ssd", "Inspur NF5488, 8×A100-40", 10.48, 9560, 912, 51, _V07),
    PublishedResult("ssd", "NVIDIA, 8×A100-80", 8.26, 12205, 912, None, _V11),
    PublishedResult("ssd", "Inspur, 8×A100-80", 7.98, 12647, 912, 50, _V11),
    PublishedResult("ssd", "Iluvatar, 8×BI-V100", None, 2858, None, 65, "the vendor's table"),
    PublishedResult("maskrcnn", "NVIDIA, 8×A100-40", 82.16, 401, None, None, _V07),
    PublishedResult("maskrcnn", "Inspur, 8×A100-80", 45.67, 619, None, None, _V11),
    PublishedResult("maskrcnn", "Dell, 4×A100-80", 83.77, 338, None, None, _V11),
)


def for_benchmark(benchmark: str) -> tuple[PublishedResult, ...]:
    """Return the published results of a benchmark."""
    return tuple(result for result in PUBLISHED_RESULTS if result.benchmark == benchmark)
