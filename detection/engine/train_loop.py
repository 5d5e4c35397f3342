"""Training loop, in the order of the MLPerf events."""

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from detection.config.run_config import RunConfig
from detection.config.settings import InputError
from detection.data.batch import Batch, RankBatch
from detection.data.prefetch import prefetch, to_device
from detection.engine import optim, save_restore
from detection.engine.state import RunContext, TrainState
from detection.engine.workload import (
    EXIT_TARGET_NOT_REACHED,
    EvalSource,
    TrainingStopped,
    TrainResult,
    TrainSource,
    Workload,
)
from detection.runtime import device
from detection.runtime.distributed import DistContext
from mlperf import system_desc


def train_to_target(workload: Workload[Batch], run: RunContext) -> TrainResult:
    """Train until a scheduled evaluation meets every target, or until the last epoch.

    The caller has logged init_start and the submission, unless the run appends to an older log. On any error, log the
    run as aborted and re-raise: NonFiniteLossError, TrainingStopped, or an error of the data set.
    """
    state = build_state(workload, run.config, run.ranks)
    warm_up(state, workload, run)
    if run.resume_point:
        save_restore.restore(state, run.resume_point, run.config, run.ranks)
    metadata = run_metadata(workload, run, state)
    run.ranks.barrier()
    if not run.appends_to_log:
        run.log.end("init")
        run.log.start("run")  # the timer; nothing above has read a byte of the data set
    run.logger.start_run(metadata)
    if run.resume_point:
        run.log.event("resumed", run.resume_point.path.name, epoch_num=state.epoch, step=state.step)
    try:
        result = train_timed(state, workload, run)
    except BaseException as error:
        run.log.end("run", status="aborted")
        run.logger.finish(converged=False, stopped_by=type(error).__name__)
        raise
    run.log.end("run", status="success" if result.target_reached else "aborted", epoch_num=result.epoch)
    run.logger.finish(converged=result.target_reached)
    return result


def train_timed(state: TrainState, workload: Workload[Batch], run: RunContext) -> TrainResult:
    """Run the timed part of the training."""
    log, logger = run.log, run.logger
    data = workload.make_train_source()
    state.categories = data.categories
    if not run.appends_to_log:
        log.event("train_samples", data.train_samples)
        log.event("eval_samples", data.eval_samples)
    logger.start_training(data.steps_per_epoch * run.config.epochs, run.config.epochs, first_step=state.step)

    if run.config.eval_before_training and not run.resume_point:
        metrics = evaluate_and_log(state, data, workload, run)
        log.event("accuracy_before_training", workload.mlperf_accuracy(metrics))
        logger.resume()

    for block in run.config.eval_blocks():
        if block[-1] < state.epoch + state.epoch_evaluated:
            continue  # completed before the run was resumed
        epoch_in_progress = not state.epoch_evaluated  # started before the run was resumed
        if not (epoch_in_progress and run.appends_to_log):
            log.start("block", first_epoch_num=block.start, epoch_count=len(block))
        for epoch in range(state.epoch if epoch_in_progress else block.start, block.stop):
            if not (epoch_in_progress and run.appends_to_log):
                log.start("epoch", epoch_num=epoch)
            if not epoch_in_progress:
                state.start_epoch(epoch)
            epoch_in_progress = False
            train_epoch(state, data, workload, run)
            log_offsets = save_restore.log_offsets(run)  # a run that is interrupted in its evaluation repeats it
            log.end("epoch", epoch_num=epoch)
        log.end("block", first_epoch_num=block.start)

        log.start("eval", epoch_num=epoch)
        logger.pause()
        run.ranks.average_running_stats(state.model)
        try:
            metrics = evaluate(state, data, workload, run)
        except KeyboardInterrupt:
            save_restore.save(state, run, log_offsets, collective=False)
            raise
        log.event("eval_accuracy", workload.mlperf_accuracy(metrics), epoch_num=epoch)
        log.end("eval", epoch_num=epoch)
        logger.log_evaluation(epoch, metrics, workload.targets)
        reached = targets_met(metrics, workload.targets)
        state.epoch_evaluated = True
        save_restore.save(state, run, save_restore.log_offsets(run), score=metrics[next(iter(workload.targets))])
        logger.resume()
        if reached:
            break
    return TrainResult(reached, epoch, metrics)


def run_metadata(workload: Workload[Batch], run: RunContext, state: TrainState) -> dict[str, object]:
    """Return the metadata of a run, for the first event of metrics.jsonl."""
    config, ranks = run.config, run.ranks
    return {
        "benchmark": config.benchmark,
        "network": config.network_name,
        "mode": config.mode,
        "system": config.system,
        "ranks": ranks.world_size,
        "device": device.device_name(ranks.device),
        "precision": state.precision.name,
        "torch": torch.__version__,
        "machine": system_desc.system_summary(),
        "seed": run.seed,
        "global_batch_size": config.global_batch_size(ranks.world_size),
        "epochs": config.epochs,
        "targets": dict(workload.targets),
        "loss_names": list(workload.loss_names),
        "resumed_from": run.resume_point.path.name if run.resume_point else None,
    }


def build_state(workload: Workload[Batch], config: RunConfig, ranks: DistContext) -> TrainState:
    """Move the model to the device, and build its optimizer and gradient scaler."""
    device.set_kernel_autotune(ranks.device, fixed_input_size=workload.fixed_input_size)
    precision = device.select_precision(config.precision, ranks.device)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    model = ranks.convert_sync_batchnorm(workload.model, config.bn_group_size(ranks.world_size))
    model = model.to(ranks.device).to(memory_format=memory_format)
    set_train_mode(model, config)
    if device.should_compile(config.compile, ranks.device):
        model.compile()
    return TrainState(
        model=ranks.wrap_ddp(model, config.gradient_dtype),
        optimizer=optim.build_sgd(
            model,
            backend=config.optimizer_backend,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            weight_decay_on_bias_and_norm=config.weight_decay_on_bias_and_norm,
            bias_lr_factor=config.bias_lr_factor,
        ),
        scaler=torch.amp.GradScaler(ranks.device.type, enabled=precision.scale_gradients),
        precision=precision,
    )


def warm_up(state: TrainState, workload: Workload[Batch], run: RunContext) -> None:
    """Train and predict on one dummy batch to compile code and allocate memory, then restore the initial state.

    Raise InputError if --compile on cannot be met. `--compile auto` falls back to eager mode.
    """
    config, ranks = run.config, run.ranks
    start_s = time.monotonic()
    initial_weights = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    compile_status = "compiled" if device.should_compile(config.compile, ranks.device) else "not compiled"

    def step() -> None:
        rank_batch = to_device(RankBatch(workload.dummy_batch(), 1, 1.0), ranks.device)
        train_step(state, rank_batch, 0.0, workload, config, ranks)

    try:
        step()
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        if config.compile == "on":
            raise InputError(f"--compile on: not possible on this machine ({reason}). Pass --compile off.") from error
        compile_status = f"not compiled: not possible on this machine ({reason})"
        device.force_eager()
        step()
    if ranks.device.type != "cpu":  # the CPU selects no kernels
        with eval_mode(state, run) as model:
            workload.predict(model, to_device(workload.dummy_eval_batch(), ranks.device))
        set_train_mode(state.model, config)
    run.logger.print(f"warmed up in {time.monotonic() - start_s:.1f} s, {compile_status}")
    state.model.load_state_dict(initial_weights)
    optim.reset_optimizer_state(state.optimizer)
    state.scaler = torch.amp.GradScaler(ranks.device.type, enabled=state.scaler.is_enabled())
    state.step = 0


def train_epoch(state: TrainState, data: TrainSource[Batch], workload: Workload[Batch], run: RunContext) -> None:
    """Train on the remaining global batches of an epoch."""
    config, ranks, logger, epoch = run.config, run.ranks, run.logger, state.epoch
    set_train_mode(state.model, config)
    lr = 0.0
    logger.start_epoch()
    with run.signals.deferred():
        mark_s = time.monotonic()
        for rank_batch in prefetch(data.train_batches(epoch, state.images_in_epoch), ranks.device):
            lr = workload.lr_schedule(state.step, epoch)
            loss = train_step(state, rank_batch, lr, workload, config, ranks)
            state.images_in_epoch += rank_batch.global_batch_size
            run.watchdog.heartbeat()
            local_step_s = state.step_timer.last_end_s["forward"] - mark_s
            num_images = rank_batch.global_batch_size
            logger.log_step(state.step - 1, epoch, loss=loss, num_images=num_images, lr=lr, local_step_s=local_step_s)
            if config.checkpoint_due("steps", state.step):
                save_restore.save(state, run, save_restore.log_offsets(run))
            check_stop_request(state, run)
            if 0 < config.max_steps <= state.step:
                save_restore.save(state, run, save_restore.log_offsets(run))
                raise TrainingStopped(f"max_steps: {state.step} steps completed", EXIT_TARGET_NOT_REACHED)
            mark_s = time.monotonic()
        logger.flush_losses(state.step - 1, epoch, lr=lr)
        logger.end_epoch(epoch, step=state.step)
        if config.checkpoint_due("epochs", epoch):
            save_restore.save(state, run, save_restore.log_offsets(run))
        check_stop_request(state, run, blocking=True)


def check_stop_request(state: TrainState, run: RunContext, *, blocking: bool = False) -> None:
    """Save and raise TrainingStopped if any rank received a stop signal.

    Without `blocking`, the ranks may agree on it a few steps later.
    """
    if signal_number := run.signals.poll(run.ranks, blocking=blocking):
        save_restore.save(state, run, save_restore.log_offsets(run))
        raise TrainingStopped(f"{signal.Signals(signal_number).name} after step {state.step}", 128 + signal_number)


def train_step(
    state: TrainState,
    rank_batch: RankBatch[Batch],
    lr: float,
    workload: Workload[Batch],
    config: RunConfig,
    ranks: DistContext,
) -> Tensor:
    """Take one optimizer step and return this rank's loss terms (L,), without waiting for the device.

    The batch, on the device, is split into `grad_accum_steps` micro-batches. Each loss is weighted by the global
    batch, so the sum of the gradients is the gradient of the global mean. Code is compiled for a full batch. The last
    batch of an epoch may be smaller and runs in eager mode.
    """
    optim.set_learning_rate(state.optimizer, lr)
    state.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros(len(workload.loss_names), device=ranks.device)
    micro_batches = split_micro_batches(rank_batch.batch, config.grad_accum_steps)
    is_full_batch = len(rank_batch.batch[0]) == config.batch_size
    with nullcontext() if is_full_batch else device.force_eager():
        for number, micro_batch in enumerate(micro_batches, start=1):
            with ranks.no_sync(state.model) if number < len(micro_batches) else nullcontext():
                with state.precision.autocast(ranks.device):
                    loss = workload.loss(state.model, micro_batch) * rank_batch.loss_weight
                state.step_timer.lap("forward")
                state.scaler.scale(loss.sum()).backward()
            total += loss.detach()
            state.step_timer.lap("backward")
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.step_timer.lap("optimizer")
    state.step += 1
    return total


def evaluate_only(workload: Workload[Batch], run: RunContext) -> TrainResult:
    """Evaluate the initial weights, without training and without an MLPerf log."""
    state = build_state(workload, run.config, run.ranks)
    run.logger.start_run(run_metadata(workload, run, state))
    metrics = evaluate_and_log(state, workload.make_eval_source(), workload, run)
    result = TrainResult(targets_met(metrics, workload.targets), 0, metrics)
    run.logger.finish(converged=result.target_reached)
    return result


def evaluate_and_log(
    state: TrainState, data: EvalSource, workload: Workload[Batch], run: RunContext
) -> dict[str, float]:
    """Evaluate a model before any training, and log its metrics."""
    run.logger.pause()
    metrics = evaluate(state, data, workload, run)
    run.logger.log_evaluation(0, metrics, workload.targets)
    return metrics


def evaluate(state: TrainState, data: EvalSource, workload: Workload[Batch], run: RunContext) -> dict[str, float]:
    """Return the metrics of the current model."""
    with eval_mode(state, run) as model:
        return workload.evaluate(model, data)


@contextmanager
def eval_mode(state: TrainState, run: RunContext) -> Iterator[nn.Module]:
    """Provide the unwrapped model in evaluation mode: no gradients, eager, autocast, a longer watchdog timeout."""
    model = run.ranks.unwrap(state.model)
    model.eval()
    with (
        torch.inference_mode(),
        run.watchdog.extended(),
        device.force_eager(),
        state.precision.autocast(run.ranks.device),
    ):
        yield model


def targets_met(metrics: Mapping[str, float], targets: Mapping[str, float]) -> bool:
    """Return whether every target is met."""
    return all(metrics[name] >= target for name, target in targets.items())


def split_micro_batches(batch: Batch, count: int) -> list[Batch]:
    """Split a batch along its first dimension into `count` micro-batches, or fewer if it has fewer images."""
    return [type(batch)(*tensors) for tensors in zip(*(t.chunk(count) for t in batch), strict=True)]


def set_train_mode(model: nn.Module, config: RunConfig) -> None:
    """Set the model to training mode, except frozen batch norm."""
    model.train()
    if config.freeze_batch_norm:
        optim.freeze_batch_norm(model)
