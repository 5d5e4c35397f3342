"""Published runs of SSD300, constants of `step_model` fitted to them, and the model checked against each of them."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from perf.scaling.step_model import TRAIN_IMAGES, Accelerator, Layout, Network, Run, System, run, step

# Bus bandwidth: NCCL assumes 235 of the 300 GB/s in each direction of an A100, and its authors assume a protocol
# overhead of a fifth on any NVLink (nccl-tests #212; users see 200, #149). Network: 85% of the links, the mean that
# users see (nccl-tests #119). Links and cores: the submissions' system descriptions.
IN_NODE, ON_NETWORK = 235 / 300, 0.85
DGX_A100 = System("DGX A100", 8, 235, 200 * ON_NETWORK, cores=16)
DGX_2H = System("DGX-2H", 16, 150 * IN_NODE, 100 * ON_NETWORK, cores=3)
DGX_1 = System("DGX-1", 8, 150 * IN_NODE, 0, cores=5)


class PublishedRun(NamedTuple):
    """Published result: median epoch time, and score in minutes (mean of the middle runs).

    relative_clock: clock rate of its accelerators relative to that of their generation.
    """

    submitter: str
    system: System
    layout: Layout
    epoch_s: float
    minutes: float
    relative_clock: float = 1.0


class Generation(NamedTuple):
    """Accelerators of one kind with software of one year.

    fitted: published runs that the model is fitted to. others: runs for validation only.
    """

    name: str
    fitted: tuple[PublishedRun, ...]
    others: tuple[PublishedRun, ...] = ()


_NF5488 = replace(DGX_A100, name="NF5488")
_XE8545 = replace(DGX_A100, name="XE8545", per_node=4, network_gb_s=50 * ON_NETWORK, cores=32)

# Median epoch_start to epoch_stop over all runs of a submission: github.com/mlcommons/training_results_v0.7, _v1.1,
# <submitter>/results/<system>/ssd/result_*.txt. Batch norm's group is model_bn_span divided by the batch of a rank.
GENERATIONS = (
    Generation(
        "A100, v1.1 (2021)",
        (
            PublishedRun("NVIDIA", DGX_A100, Layout(1, 8, 114), 9.572, 8.258),
            PublishedRun("NVIDIA", DGX_A100, Layout(8, 8, 24, 2), 1.537, 1.524),
            PublishedRun("NVIDIA", DGX_A100, Layout(128, 8, 3, 8), 0.309, 0.454),
        ),
        (
            PublishedRun("Inspur", replace(_NF5488, name="NF5488A5"), Layout(1, 8, 114), 9.271, 7.979),
            PublishedRun("Dell", _XE8545, Layout(2, 4, 114), 9.827, 8.735),
            PublishedRun("Azure", replace(DGX_A100, name="ND96amsr"), Layout(8, 8, 24, 2), 1.566, 1.517),
            PublishedRun("Azure", replace(DGX_A100, name="ND96amsr"), Layout(128, 8, 3, 8), 0.305, 0.455),
        ),
    ),
    Generation(
        "A100, v0.7 (2020)",
        (
            PublishedRun("NVIDIA", DGX_A100, Layout(1, 8, 114), 11.948, 10.215),
            PublishedRun("NVIDIA", DGX_A100, Layout(2, 8, 56), 6.534, 5.678),
            PublishedRun("NVIDIA", DGX_A100, Layout(8, 8, 24), 2.157, 2.250),
            PublishedRun("NVIDIA", DGX_A100, Layout(64, 8, 4, 4), 0.765, 0.891),
        ),
        (PublishedRun("Inspur", _NF5488, Layout(1, 8, 114), 12.263, 10.482),),
    ),
    Generation(
        "V100 450 W, v0.7 (2020)",
        (
            PublishedRun("NVIDIA", DGX_2H, Layout(1, 16, 56), 11.172, 9.655),
            PublishedRun("NVIDIA", DGX_2H, Layout(4, 16, 24), 3.656, 3.934),
            PublishedRun("NVIDIA", DGX_2H, Layout(64, 16, 2, 8), 0.970, 1.135),
        ),
        # The DGX-1 has V100 of 300 W, at 1.5 instead of 1.7 GHz.
        (PublishedRun("NVIDIA", DGX_1, Layout(1, 8, 120), 24.378, 20.690, relative_clock=1.5 / 1.7),),
    ),
)


def fit(network: Network, published: Sequence[PublishedRun]) -> Accelerator:
    """Fit an accelerator to the steps of at least two published runs: least squares of the relative errors.

    Communication time is subtracted first. Its exposed part depends on the fit, so the fit iterates.
    """
    accelerator = Accelerator(math.inf, 0.0)
    steps_s = np.array([one.epoch_s / TRAIN_IMAGES * one.layout.global_batch_size for one in published])
    columns = np.array([[1, one.layout.batch_size] for one in published]) / steps_s[:, None]
    for _ in range(5):
        steps = [step(network, accelerator, one.system, one.layout) for one in published]
        exposed_s = np.array([one.gradient + one.batch_norm for one in steps])
        (overhead_s, image_s), *_ = np.linalg.lstsq(columns, 1 - exposed_s / steps_s, rcond=None)
        accelerator = Accelerator(1 / float(image_s), max(0.0, float(overhead_s)))
    return accelerator


class Check(NamedTuple):
    """Published run and the model's prediction. device_counts: of the other runs that the model is fitted to."""

    published: PublishedRun
    run: Run
    device_counts: tuple[int, ...]

    @property
    def epoch_error(self) -> float:
        """Relative error of the epoch time."""
        return self.run.epoch_s / self.published.epoch_s - 1

    @property
    def minutes_error(self) -> float:
        """Relative error of the score, which includes epochs to the target and evaluation."""
        return self.run.minutes / self.published.minutes - 1


def check(network: Network, generation: Generation) -> list[Check]:
    """Predict each published run of a generation from the others, without its own measurement."""
    checks = []
    for one in (*generation.fitted, *generation.others):
        known = [other for other in generation.fitted if other is not one]
        accelerator = fit(network, known)
        accelerator = accelerator._replace(images_per_s=accelerator.images_per_s * one.relative_clock)
        predicted = run(network, accelerator, one.system, one.layout)
        checks.append(Check(one, predicted, tuple(other.layout.ranks for other in known)))
    return checks
