"""Training loop, in the order of the MLPerf events."""

import signal
import time
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from detection.config.run_config import RunConfig
from detection.data.batch import Batch, RankBatch, split_micro_batches
from detection.data.prefetch import prefetch
from detection.engine import optim, save_restore
from detection.engine.evaluation import evaluate, evaluate_initial, finish, targets_met
from detection.engine.initialization import build_state, warm_up
from detection.engine.metadata import run_metadata
from detection.engine.model_mode import set_train_mode
from detection.engine.remaining_work import remaining_blocks, remaining_epochs
from detection.engine.state import RunContext, TrainState
from detection.engine.workload import TrainingStopped, TrainResult, TrainSource, Workload
from detection.runtime import device
from detection.runtime.distributed import DistContext


def train_to_target(workload: Workload[Batch], run: RunContext) -> TrainResult:
    """Train until a scheduled evaluation meets every target, or until the last epoch.

    The caller has logged init_start and the submission, unless the run appends to an older log. On any error, log the
    run as aborted and re-raise: NonFiniteLossError, TrainingStopped, or an error of the data set.
    """
    state = build_state(workload, run.config, run.ranks)
    warm_up(state, workload, run, train_step)
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
        data = workload.make_train_source()
        result = train_timed(state, data, workload, run)
    except BaseException as error:
        run.log.end("run", status="aborted")
        run.logger.finish(converged=False, stopped_by=type(error).__name__, stop_reason=str(error))
        raise
    run.log.end("run", status="success" if result.target_reached else "aborted", epoch_num=result.epoch)
    finish(result, state, data, workload, run)
    return result


def train_timed(state: TrainState, data: TrainSource[Batch], workload: Workload[Batch], run: RunContext) -> TrainResult:
    """Run the timed part of the training."""
    log, logger = run.log, run.logger
    state.categories = data.categories
    if not run.appends_to_log:
        log.event("train_samples", data.train_samples)
        log.event("eval_samples", data.eval_samples)
    logger.start_training(data.steps_per_epoch, run.config.epochs, state.step, state.skipped_steps)

    if run.config.eval_before_training and not run.resume_point:
        metrics = evaluate_initial(state, data, workload, run)
        log.event("accuracy_before_training", workload.mlperf_accuracy(metrics))
        logger.resume()

    for block in remaining_blocks(state, run):
        logger.start_block(block, state.step)
        for epoch in remaining_epochs(block, state, run):
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


def train_epoch(state: TrainState, data: TrainSource[Batch], workload: Workload[Batch], run: RunContext) -> None:
    """Train on the remaining global batches of an epoch."""
    config, ranks, logger, epoch = run.config, run.ranks, run.logger, state.epoch
    set_train_mode(state.model, config)
    lr = 0.0
    logger.start_epoch()
    with run.signals.deferred():
        mark_s = time.monotonic()
        for rank_batch in prefetch(data.train_batches(epoch, state.images_in_epoch), ranks.device):
            lr = optim.set_learning_rates(
                state.optimizer, partial(workload.lr_schedule, state.step, epoch, data.steps_per_epoch)
            )
            loss = train_step(state, rank_batch, workload, config, ranks)
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
                raise TrainingStopped(f"--max-steps as requested: {state.step} steps completed", 0)
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
    state: TrainState, rank_batch: RankBatch[Batch], workload: Workload[Batch], config: RunConfig, ranks: DistContext
) -> Tensor:
    """Take one optimizer step and return this rank's loss terms (L,), without waiting for the device.

    The learning rates are those of the optimizer. The batch, on the device, is split into `grad_accum_steps`
    micro-batches. Each loss is weighted by the global batch, so the sum of the gradients is the gradient of the global
    mean. Code is compiled for a full batch. The last batch of an epoch may be smaller and runs in eager mode. A step
    that the gradient scaler skips counts as a step.
    """
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
    if state.scaler.is_enabled():
        scale = state.scaler.scale(torch.ones_like(total[0]))
        state.scaler.update()
        state.skipped_steps += state.scaler.scale(torch.ones_like(total[0])) < scale
    state.step_timer.lap("optimizer")
    state.step += 1
    return total
