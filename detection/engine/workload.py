"""Interface between the training loop and a workload: plain functions, no hooks."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol

from torch import Tensor, nn

from detection.data.batch import Batch, RankBatch
from detection.data.coco import Category
from detection.data.eval_source import OtherEvaluation

EXIT_TARGET_NOT_REACHED = 3  # exit status of a run below its target


class EvalSource(Protocol):
    """Evaluation images, opened after the timer has started."""

    eval_samples: int

    def eval_batches(self) -> Iterator[Any]:
        """Yield this rank's evaluation batches. Each image is on exactly one rank."""


class TrainSource(EvalSource, Protocol[Batch]):
    """Training and evaluation images, opened after the timer has started."""

    train_samples: int
    steps_per_epoch: int
    categories: tuple[Category, ...]

    def train_batches(self, epoch: int, skip_images: int) -> Iterator[RankBatch[Batch]]:
        """Yield this rank's batches of an epoch (from 1), without its first `skip_images` images."""


@dataclass(frozen=True)
class Workload(Generic[Batch]):
    """Model, data, loss and evaluation of one benchmark.

    model: on the CPU, with its initial weights.
    loss: loss terms (L,) of a batch on the device, each summed over the images. Training minimizes their sum.
    loss_names: names of the L terms.
    dummy_batch, dummy_eval_batch: batches of the real shapes, made without the data set.
    lr_schedule: learning rate of a step (from 0) in an epoch (from 1) of so many steps, for weights of an `lr_factor`.
    predict: detections of the model in an evaluation batch on the device.
    evaluate: metrics over the evaluation set, identical on every rank.
    evaluate_other: after `evaluate`, the metrics of the other choice of --eval-images, or None if they are the same.
    targets: minimum value of each metric that ends the run.
    mlperf_accuracy: value of MLPerf's eval_accuracy event for the metrics.
    fixed_input_size: all batches have the same shapes, including the crops that the network makes of them.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Batch], Tensor]
    loss_names: tuple[str, ...]
    dummy_batch: Callable[[], Batch]
    dummy_eval_batch: Callable[[], Any]
    make_train_source: Callable[[], TrainSource[Batch]]
    make_eval_source: Callable[[], EvalSource]
    lr_schedule: Callable[[int, int, int, float], float]
    predict: Callable[[nn.Module, Any], object]
    evaluate: Callable[[nn.Module, Any], dict[str, float]]
    evaluate_other: Callable[[nn.Module, Any], OtherEvaluation | None]
    targets: Mapping[str, float]
    mlperf_accuracy: Callable[[Mapping[str, float]], object]
    fixed_input_size: bool = True


@dataclass(frozen=True)
class TrainResult:
    """Outcome of a run: its last epoch and the metrics there."""

    target_reached: bool
    epoch: int
    metrics: dict[str, float]


class TrainingStopped(Exception):
    """Early stop of a run, after it saved a checkpoint. status: exit status."""

    def __init__(self, reason: str, status: int):
        super().__init__(reason)
        self.status = status
