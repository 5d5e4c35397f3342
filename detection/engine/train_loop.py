"""The one loop: train until every target is met at a scheduled evaluation, or the epochs are used up.

Written in the order of the MLPerf events. What is trained is a `Benchmark`: plain functions, no hooks.
"""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, Protocol

import torch
from torch import Tensor, nn

from detection.config.run_config import RunConfig
from detection.config.settings import InputError
from detection.data.batch import Batch, Share
from detection.data.coco import Category
from detection.data.prefetch import move, prefetch
from detection.engine import optim, save_restore
from detection.engine.state import Run, State
from detection.runtime import device
from detection.runtime.distributed import Ranks
from mlperf import system_desc

NOT_REACHED = 3  # exit status of a run that ended below its target


class EvalData(Protocol):
    """The images to evaluate, opened after the clock has started."""

    eval_samples: int

    def eval_batches(self) -> Iterator[Any]:
        """This rank's evaluation images, in batches; each image is on one rank."""


class TrainData(EvalData, Protocol[Batch]):
    """The whole data set, opened after the clock has started."""

    train_samples: int
    steps_per_epoch: int
    categories: tuple[Category, ...]

    def shares(self, epoch: int, samples: int) -> Iterator[Share[Batch]]:
        """This rank's shares of the global batches of an epoch (from 1), but for its first `samples` images."""


@dataclass(frozen=True)
class Benchmark(Generic[Batch]):
    """What the loop needs to know about what it trains.

    model: on the CPU, with its first weights. loss: the parts (L,) of the loss of a batch on the device, each summed
    over its images; what is trained is the sum of the parts, which loss_names names.
    made_up_batch: of the real shape, drawn without data, and made_up_eval_batch. learning_rate: of a step (from 0)
    in an epoch (from 1). detect: what the model sees in a batch of evaluation images on the device. evaluate: the
    metrics over all of them, the same numbers on every rank. targets: metrics that end the run when all are reached.
    accuracy: what MLPerf's eval_accuracy says of the metrics. one_size: whether all images of a run, and all that is
    cut out of them, come in batches of the same sizes.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Batch], Tensor]
    loss_names: tuple[str, ...]
    made_up_batch: Callable[[], Batch]
    made_up_eval_batch: Callable[[], Any]
    open_data: Callable[[], TrainData[Batch]]
    open_eval_data: Callable[[], EvalData]
    learning_rate: Callable[[int, int], float]
    detect: Callable[[nn.Module, Any], object]
    evaluate: Callable[[nn.Module, Any], dict[str, float]]
    targets: Mapping[str, float]
    accuracy: Callable[[Mapping[str, float]], object]
    one_size: bool = True


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    reached: bool
    epoch: int
    metrics: dict[str, float]


class Stopped(Exception):
    """The run was to end before its time; all that it had reached is saved. status: the exit status."""

    def __init__(self, why: str, status: int):
        super().__init__(why)
        self.status = status


def train_to_target(benchmark: Benchmark[Batch], run: Run) -> Outcome:
    """Train until every target is met at a scheduled evaluation, or the epochs are used up.

    The caller has logged init_start and what is submitted, unless an older log goes on. Raises Diverged, Stopped and
    whatever the data raise, after it has logged the run as aborted.
    """
    state = build(benchmark, run.config, run.ranks)
    warm_up(state, benchmark, run)
    if run.resumed:
        save_restore.restore(state, run.resumed, run.config, run.ranks)
    told = facts(benchmark, run, state)
    run.ranks.barrier()
    if not run.continues:
        run.log.end("init")
        run.log.start("run")  # the clock; no byte of the data set was read above
    run.progress.start_clock(told)
    if run.resumed:
        run.log.point("resumed", run.resumed.path.name, epoch_num=state.epoch, step=state.step)
    try:
        outcome = train_timed(state, benchmark, run)
    except BaseException as error:
        run.log.end("run", status="aborted")
        run.progress.end(converged=False, stopped_by=type(error).__name__)
        raise
    run.log.end("run", status="success" if outcome.reached else "aborted", epoch_num=outcome.epoch)
    run.progress.end(converged=outcome.reached)
    return outcome


def train_timed(state: State, benchmark: Benchmark[Batch], run: Run) -> Outcome:
    """The part of the run that is on the clock."""
    log, progress = run.log, run.progress
    data = benchmark.open_data()
    state.categories = data.categories
    if not run.continues:
        log.point("train_samples", data.train_samples)
        log.point("eval_samples", data.eval_samples)
    progress.begin(data.steps_per_epoch * run.config.epochs, run.config.epochs, first_step=state.step)

    if run.config.eval_before_training and not run.resumed:
        metrics = evaluate_once(state, data, benchmark, run)
        log.point("accuracy_before_training", benchmark.accuracy(metrics))
        progress.resume()

    for block in run.config.blocks():
        if block[-1] < state.epoch + state.evaluated:
            continue  # a resumed run has this one behind it
        inside = not state.evaluated  # a resumed run has begun this one
        if not (inside and run.continues):
            log.start("block", first_epoch_num=block.start, epoch_count=len(block))
        for epoch in range(state.epoch if inside else block.start, block.stop):
            if not (inside and run.continues):
                log.start("epoch", epoch_num=epoch)
            if not inside:
                state.begin(epoch)
            inside = False
            train_epoch(state, data, benchmark, run)
            written = save_restore.positions(run)  # a run that is broken off in its evaluation does that again
            log.end("epoch", epoch_num=epoch)
        log.end("block", first_epoch_num=block.start)

        log.start("eval", epoch_num=epoch)
        progress.pause()
        run.ranks.average_batch_norm(state.model)
        try:
            metrics = evaluate(state, data, benchmark, run)
        except KeyboardInterrupt:
            save_restore.save(state, run, written, together=False)
            raise
        log.point("eval_accuracy", benchmark.accuracy(metrics), epoch_num=epoch)
        log.end("eval", epoch_num=epoch)
        progress.evaluated(epoch, metrics, benchmark.targets)
        reached = all_reached(metrics, benchmark.targets)
        state.evaluated = True
        save_restore.save(state, run, save_restore.positions(run), score=metrics[next(iter(benchmark.targets))])
        progress.resume()
        if reached:
            break
    return Outcome(reached, epoch, metrics)


def facts(benchmark: Benchmark[Batch], run: Run, state: State) -> dict[str, object]:
    """What the event log says of a run at its start."""
    config, ranks = run.config, run.ranks
    return {
        "benchmark": config.benchmark,
        "network": config.network_name,
        "mode": config.mode,
        "system": config.system,
        "ranks": ranks.world_size,
        "device": device.describe(ranks.device),
        "precision": state.precision.name,
        "torch": torch.__version__,
        "machine": system_desc.summary(),
        "seed": run.seed,
        "global_batch_size": config.global_batch_size(ranks.world_size),
        "epochs": config.epochs,
        "targets": dict(benchmark.targets),
        "loss_names": list(benchmark.loss_names),
        "resumed_from": run.resumed.path.name if run.resumed else None,
    }


def build(benchmark: Benchmark[Batch], config: RunConfig, ranks: Ranks) -> State:
    """Move the model to the device, and make what trains it."""
    device.tune(ranks.device, one_size=benchmark.one_size)
    precision = device.precision(config.precision, ranks.device)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    model = ranks.share_batch_norm(benchmark.model, config.bn_ranks(ranks.world_size))
    model = model.to(ranks.device).to(memory_format=memory_format)
    set_training(model, config)
    if device.compiles(config.compile, ranks.device):
        model.compile()
    return State(
        model=ranks.wrap(model, config.gradient_dtype),
        optimizer=optim.make_sgd(
            model,
            kernels=config.optimizer_backend,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            weight_decay_on_bias_and_norm=config.weight_decay_on_bias_and_norm,
            bias_lr_factor=config.bias_lr_factor,
        ),
        scaler=torch.amp.GradScaler(ranks.device.type, enabled=precision.scale_gradients),
        precision=precision,
    )


def warm_up(state: State, benchmark: Benchmark[Batch], run: Run) -> None:
    """Train a step on made-up images and detect in some, so that code is compiled and memory laid out; then undo it.

    Raises InputError where --compile on was asked for and cannot be done; "auto" goes on without.
    """
    config, ranks = run.config, run.ranks
    start_s = time.monotonic()
    fresh = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    how = "compiled" if device.compiles(config.compile, ranks.device) else "not compiled"

    def step() -> None:
        share = move(Share(benchmark.made_up_batch(), 1, 1.0), ranks.device)
        train_step(state, share, 0.0, benchmark, config, ranks)

    try:
        step()
    except torch._dynamo.exc.TorchDynamoException as error:
        why = " ".join(str(error).split("\n\n")[0].split())
        if config.compile == "on":
            raise InputError(f"--compile on: that is not possible here ({why}). Pass --compile off.") from error
        how = f"not compiled, since that is not possible here ({why})"
        device.eager()
        step()
    if ranks.device.type != "cpu":  # which chooses no kernels
        with evaluating(state, run) as model:
            benchmark.detect(model, move(benchmark.made_up_eval_batch(), ranks.device))
        set_training(state.model, config)
    run.progress.say(f"warmed up in {time.monotonic() - start_s:.1f} s, {how}")
    state.model.load_state_dict(fresh)
    optim.forget(state.optimizer)
    state.scaler = torch.amp.GradScaler(ranks.device.type, enabled=state.scaler.is_enabled())
    state.step = 0


def train_epoch(state: State, data: TrainData[Batch], benchmark: Benchmark[Batch], run: Run) -> None:
    """Train on every global batch that is left of an epoch."""
    config, ranks, progress, epoch = run.config, run.ranks, run.progress, state.epoch
    set_training(state.model, config)
    lr = 0.0
    progress.begin_epoch()
    with run.interruption.deferred():
        mark_s = time.monotonic()
        for share in prefetch(data.shares(epoch, state.samples), ranks.device):
            lr = benchmark.learning_rate(state.step, epoch)
            loss = train_step(state, share, lr, benchmark, config, ranks)
            state.samples += share.num_images
            run.watchdog.beat()
            alone_s = state.phases.end_s["forward"] - mark_s
            progress.step(state.step - 1, epoch, loss=loss, num_images=share.num_images, lr=lr, alone_s=alone_s)
            if config.saves_after("steps", state.step):
                save_restore.save(state, run, save_restore.positions(run))
            stop_if_asked(state, run)
            if 0 < config.max_steps <= state.step:
                save_restore.save(state, run, save_restore.positions(run))
                raise Stopped(f"max_steps: {state.step} steps are made", NOT_REACHED)
            mark_s = time.monotonic()
        progress.read(state.step - 1, epoch, lr=lr)
        progress.end_epoch(epoch, step=state.step)
        if config.saves_after("epochs", epoch):
            save_restore.save(state, run, save_restore.positions(run))
        stop_if_asked(state, run, at_once=True)


def stop_if_asked(state: State, run: Run, *, at_once: bool = False) -> None:
    """Save and raise Stopped if any rank was told to end; not `at_once`, the ranks may agree on it some steps later."""
    if signal_number := run.interruption.asked(run.ranks, at_once=at_once):
        save_restore.save(state, run, save_restore.positions(run))
        raise Stopped(f"{signal.Signals(signal_number).name} after step {state.step}", 128 + signal_number)


def train_step(
    state: State,
    share: Share[Batch],
    lr: float,
    benchmark: Benchmark[Batch],
    config: RunConfig,
    ranks: Ranks,
) -> Tensor:
    """One optimiser step; returns this rank's parts of the loss, (L,), without waiting for them.

    The share, on the device, is computed in `grad_accum_steps` parts. Each part's loss carries the weight of the
    whole global batch, so that the sum of their gradients is the gradient of its mean. What is compiled is so for
    a full batch: the last of an epoch, which is smaller, is computed without.
    """
    optim.set_learning_rate(state.optimizer, lr)
    state.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros(len(benchmark.loss_names), device=ranks.device)
    parts = split(share.batch, config.grad_accum_steps)
    is_full = len(share.batch[0]) == config.batch_size
    with nullcontext() if is_full else device.eager():
        for number, part in enumerate(parts, start=1):
            with ranks.no_sync(state.model) if number < len(parts) else nullcontext():
                with state.precision.autocast(ranks.device):
                    loss = benchmark.loss(state.model, part) * share.weight
                state.phases.end("forward")
                state.scaler.scale(loss.sum()).backward()
            total += loss.detach()
            state.phases.end("backward")
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.phases.end("optimiser")
    state.step += 1
    return total


def evaluate_only(benchmark: Benchmark[Batch], run: Run) -> Outcome:
    """Evaluate the model with the weights that it has; nothing is trained, and no MLPerf log is written."""
    state = build(benchmark, run.config, run.ranks)
    run.progress.start_clock(facts(benchmark, run, state))
    metrics = evaluate_once(state, benchmark.open_eval_data(), benchmark, run)
    outcome = Outcome(all_reached(metrics, benchmark.targets), 0, metrics)
    run.progress.end(converged=outcome.reached)
    return outcome


def evaluate_once(state: State, data: EvalData, benchmark: Benchmark[Batch], run: Run) -> dict[str, float]:
    """The metrics of a model that is not trained yet, shown."""
    run.progress.pause()
    metrics = evaluate(state, data, benchmark, run)
    run.progress.evaluated(0, metrics, benchmark.targets)
    return metrics


def evaluate(state: State, data: EvalData, benchmark: Benchmark[Batch], run: Run) -> dict[str, float]:
    """The metrics of the model as it is now."""
    with evaluating(state, run) as model:
        return benchmark.evaluate(model, data)


@contextmanager
def evaluating(state: State, run: Run) -> Iterator[nn.Module]:
    """The model as it is to be evaluated, and what surrounds that."""
    model = run.ranks.unwrap(state.model)
    model.eval()
    with (
        torch.inference_mode(),
        run.watchdog.patient(),
        device.eager(),
        state.precision.autocast(run.ranks.device),
    ):
        yield model


def all_reached(metrics: Mapping[str, float], targets: Mapping[str, float]) -> bool:
    """Whether every target is met."""
    return all(metrics[name] >= target for name, target in targets.items())


def split(batch: Batch, num_parts: int) -> list[Batch]:
    """Cut each tensor of a batch into parts of its first dimension; fewer where there are fewer images."""
    return [type(batch)(*tensors) for tensors in zip(*(t.chunk(num_parts) for t in batch), strict=True)]


def set_training(model: nn.Module, config: RunConfig) -> None:
    """Put the model in training mode, its batch norm only if that is trained."""
    model.train()
    if config.freeze_batch_norm:
        optim.freeze_batch_norm(model)
