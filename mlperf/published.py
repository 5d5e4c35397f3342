"""Published results of other systems, with their sources."""

from dataclasses import dataclass


def _logs(version: str) -> str:
    return f"result logs of MLPerf Training {version}, mlcommons/training_results_{version}"


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
    PublishedResult("ssd", "NVIDIA DGX-1, 8×V100", 20.69, 4811, 960, 50, _logs("v0.7")),
    PublishedResult("ssd", "NVIDIA, 8×A100-40", 10.21, 9818, 912, None, _logs("v0.7")),
    PublishedResult("ssd", "Inspur NF5488, 8×A100-40", 10.48, 9560, 912, 51, _logs("v0.7")),
    PublishedResult("ssd", "NVIDIA, 8×A100-80", 8.26, 12205, 912, None, _logs("v1.1")),
    PublishedResult("ssd", "Inspur, 8×A100-80", 7.98, 12647, 912, 50, _logs("v1.1")),
    PublishedResult("ssd", "Iluvatar, 8×BI-V100", None, 2858, None, 65, "the vendor's table"),
    PublishedResult("maskrcnn", "NVIDIA, 8×A100-40", 82.16, 401, None, None, _logs("v0.7")),
    PublishedResult("maskrcnn", "Inspur, 8×A100-80", 45.67, 619, None, None, _logs("v1.1")),
    PublishedResult("maskrcnn", "Dell, 4×A100-80", 83.77, 338, None, None, _logs("v1.1")),
    PublishedResult("maskrcnn", "NVIDIA DGX H100, 8×H100", 19.18, 1493, 96, 14, _logs("v3.0")),
    PublishedResult("retinanet", "NVIDIA DGX A100, 8×A100-80", 84.40, 976, 256, 4, _logs("v2.0")),
    PublishedResult("retinanet", "NVIDIA DGX H100, 8×H100", 37.01, 2217, 256, 4, _logs("v3.0")),
    PublishedResult("retinanet", "ASUSTeK, 8×H100", 35.96, 2293, 256, 4, _logs("v3.1")),
    PublishedResult("retinanet", "Fujitsu, 4×H100", 69.70, 1182, 256, 4, _logs("v4.0")),
    PublishedResult("retinanet", "NVIDIA, 8×H200", 34.26, 2407, 256, 4, _logs("v4.0")),
    PublishedResult("retinanet", "Supermicro, 8×H200", 32.93, 2501, 256, 4, _logs("v4.1")),
    PublishedResult("retinanet", "Supermicro, 8×B200", 21.51, 3925, 256, 4, _logs("v5.1")),
    PublishedResult("retinanet", "NVIDIA, 8×GB200", 22.33, 4036, 256, 4, _logs("v5.1")),
)


def for_benchmark(benchmark: str) -> tuple[PublishedResult, ...]:
    """Return the published results of a benchmark."""
    return tuple(result for result in PUBLISHED_RESULTS if result.benchmark == benchmark)
