"""The one loop: train until every target is met at a scheduled evaluation, or the epochs are used up.

Written in the order of the MLPerf events. What is trained is a `Benchmark`: plain functions, no hooks.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from detection import checkpoint, device, optim
from detection.config import to_json
from detection.device import Precision
from detection.distributed import Ranks
from detection.progress import Progress
from detection.run_config import RunConfig
from mlperf.log import MlperfLog

Batch = TypeVar("Batch", bound=NamedTuple)


class Share(NamedTuple, Generic[Batch]):
    """A rank's share of a global batch.

    num_images: of the global batch. weight: what the sum of the losses of this share is multiplied by, so that
    the mean over ranks is the mean over the global batch: ranks / num_images, or 0 where the rank had nothing
    to add.
    """

    batch: Batch
    num_images: int
    weight: float


class TrainData(Protocol[Batch]):
    """The data set, opened after the clock has started."""

    train_samples: int
    eval_samples: int
    steps_per_epoch: int

    def shares(self, epoch: int) -> Iterator[Share[Batch]]:
        """This rank's shares of the global batches of an epoch (from 1)."""


@dataclass(frozen=True)
class Benchmark(Generic[Batch]):
    """What the loop needs to know about what it trains.

    model: on the CPU, with its first weights. loss: sum of the losses of a batch's images, (). made_up_batch: of
    the real shape, drawn without data. learning_rate: of a step (from 0) in an epoch (from 1). evaluate: the
    metrics over all evaluation images, the same numbers on every rank. targets: metrics that end the run when all
    are reached. accuracy: what MLPerf's eval_accuracy says of the metrics.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Batch], Tensor]
    made_up_batch: Callable[[], Batch]
    open_data: Callable[[], TrainData[Batch]]
    learning_rate: Callable[[int, int], float]
    evaluate: Callable[[nn.Module, Any], dict[str, float]]
    targets: Mapping[str, float]
    accuracy: Callable[[Mapping[str, float]], object]


@dataclass
class State:
    """What is trained, and what training changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: Precision
    step: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    reached: bool
    epoch: int
    metrics: dict[str, float]


def run(
    benchmark: Benchmark[Batch],
    config: RunConfig,
    ranks: Ranks,
    log: MlperfLog,
    progress: Progress,
    folder: Path,
) -> Outcome:
    """Train until every target is met at a scheduled evaluation, or the epochs are used up.

    The caller has logged init_start and what is submitted. Raises Diverged, and whatever the data raise, after
    it has logged the run as aborted.
    """
    state = build(benchmark, config, ranks)
    warm_up(state, benchmark, config, ranks)
    ranks.barrier()
    log.end("init")

    log.start("run")  # the clock; no byte of the data set was read above
    try:
        outcome = train(state, benchmark, config, ranks, log, progress, folder)
    except BaseException:
        log.end("run", status="aborted")
        raise
    log.end("run", status="success" if outcome.reached else "aborted", epoch_num=outcome.epoch)
    return outcome


def train(
    state: State,
    benchmark: Benchmark[Batch],
    config: RunConfig,
    ranks: Ranks,
    log: MlperfLog,
    progress: Progress,
    folder: Path,
) -> Outcome:
    """The part of the run that is on the clock."""
    data = benchmark.open_data()
    log.point("train_samples", data.train_samples)
    log.point("eval_samples", data.eval_samples)
    progress.begin(data.steps_per_epoch * config.epochs, config.epochs)

    for block in config.blocks():
        log.start("block", first_epoch_num=block.start, epoch_count=len(block))
        for epoch in block:
            log.start("epoch", epoch_num=epoch)
            train_epoch(state, data.shares(epoch), epoch, benchmark, config, ranks, progress)
            log.end("epoch", epoch_num=epoch)
        log.end("block", first_epoch_num=block.start)

        log.start("eval", epoch_num=epoch)
        progress.pause()
        ranks.average_batch_norm(state.model)
        metrics = evaluate(state, data, benchmark, ranks)
        log.point("eval_accuracy", benchmark.accuracy(metrics), epoch_num=epoch)
        log.end("eval", epoch_num=epoch)
        progress.evaluated(epoch, metrics, benchmark.targets)
        reached = all(metrics[name] >= target for name, target in benchmark.targets.items())
        if ranks.is_first:
            score = metrics[next(iter(benchmark.targets))]
            checkpoint.save(folder / "checkpoints", epoch, score, snapshot(state, config, ranks, epoch))
        progress.resume()
        if reached:
            break
    return Outcome(reached, epoch, metrics)


def build(benchmark: Benchmark[Batch], config: RunConfig, ranks: Ranks) -> State:
    """Move the model to the device, and make what trains it."""
    device.tune(ranks.device)
    precision = device.precision(config.precision, ranks.device)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    model = benchmark.model.to(ranks.device).to(memory_format=memory_format)
    set_training(model, config)
    return State(
        model=ranks.wrap(model),
        optimizer=optim.make_sgd(model, kernels=config.sgd, momentum=config.momentum, weight_decay=config.weight_decay),
        scaler=torch.amp.GradScaler(ranks.device.type, enabled=precision.scale_gradients),
        precision=precision,
    )


def warm_up(state: State, benchmark: Benchmark[Batch], config: RunConfig, ranks: Ranks) -> None:
    """Train a step on a made-up batch, so that kernels are chosen and memory is laid out, then undo it."""
    fresh = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    train_step(state, Share(benchmark.made_up_batch(), 1, 1.0), 0.0, benchmark, config, ranks)
    state.model.load_state_dict(fresh)
    state.optimizer.state.clear()
    state.scaler = torch.amp.GradScaler(ranks.device.type, enabled=state.scaler.is_enabled())
    state.step = 0


def train_epoch(
    state: State,
    shares: Iterator[Share[Batch]],
    epoch: int,
    benchmark: Benchmark[Batch],
    config: RunConfig,
    ranks: Ranks,
    progress: Progress,
) -> None:
    """Train on every global batch of an epoch."""
    set_training(state.model, config)
    for share in shares:
        lr = benchmark.learning_rate(state.step, epoch)
        loss = train_step(state, share, lr, benchmark, config, ranks)
        progress.step(state.step - 1, epoch, loss=loss, num_images=share.num_images, lr=lr)
    progress.read(state.step - 1, epoch, lr=lr)


def train_step(
    state: State,
    share: Share[Batch],
    lr: float,
    benchmark: Benchmark[Batch],
    config: RunConfig,
    ranks: Ranks,
) -> Tensor:
    """One optimiser step; returns this rank's part of the loss, (), without waiting for it.

    The share is computed in `accumulation_steps` parts. Each part's loss carries the weight of the whole global
    batch, so that the sum of their gradients is the gradient of its mean.
    """
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=ranks.device)
    parts = split(share.batch, config.accumulation_steps)
    for number, part in enumerate(parts, start=1):
        with ranks.no_sync(state.model) if number < len(parts) else nullcontext():
            with state.precision.autocast(ranks.device):
                loss = benchmark.loss(state.model, part) * share.weight
            state.scaler.scale(loss).backward()
        total += loss.detach()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.step += 1
    return total


@torch.inference_mode()
def evaluate(state: State, data: TrainData[Batch], benchmark: Benchmark[Batch], ranks: Ranks) -> dict[str, float]:
    """The metrics of the model as it is now."""
    model = ranks.unwrap(state.model)
    model.eval()
    with state.precision.autocast(ranks.device):
        return benchmark.evaluate(model, data)


def split(batch: Batch, num_parts: int) -> list[Batch]:
    """Cut each tensor of a batch into parts of its first dimension; fewer where there are fewer images."""
    return [type(batch)(*tensors) for tensors in zip(*(t.chunk(num_parts) for t in batch), strict=True)]


def set_training(model: nn.Module, config: RunConfig) -> None:
    """Put the model in training mode, its batch norm only if that is trained."""
    model.train()
    if config.freeze_batch_norm:
        optim.freeze_batch_norm(model)


def snapshot(state: State, config: RunConfig, ranks: Ranks, epoch: int) -> dict[str, Any]:
    """What a checkpoint holds: weights, optimiser, scaler, and where training stands."""
    return {
        "model": ranks.unwrap(state.model).state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "epoch": epoch,
        "step": state.step,
        "config": to_json(config),
    }
