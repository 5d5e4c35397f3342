"""Conversion of the training state to a checkpoint and back."""

from collections.abc import Mapping
from dataclasses import asdict

from detection.checkpoint import checkpointer, resume
from detection.checkpoint.resume import ResumePoint
from detection.config.run_config import RunConfig
from detection.config.settings import InputError, to_json
from detection.engine.state import RunContext, TrainState
from detection.runtime import sync_batch_norm
from detection.runtime.distributed import DistContext


def log_offsets(run: RunContext) -> dict[str, int]:
    """Return the current sizes of the log files in bytes. A resumed run truncates them to these."""
    return {"log": run.log.file_offset(), "metrics": run.logger.file_offset()}


def save(
    state: TrainState,
    run: RunContext,
    log_offsets: Mapping[str, int],
    *,
    score: float | None = None,
    collective: bool = True,
) -> None:
    """Write a checkpoint on the first rank. If the disk is full, continue without that checkpoint.

    collective: all ranks call this, and their batch-norm statistics are gathered. Otherwise only this rank's are saved,
    which must be the same on all ranks.
    """
    model = run.ranks.unwrap(state.model)
    rows = sync_batch_norm.running_stats(model).unsqueeze(0)
    if collective:
        rows = run.ranks.all_gather_rows(rows)
    if not run.ranks.is_main:
        return
    content = {
        "benchmark": run.config.benchmark,
        "model": model.state_dict(),
        "batch_norm": rows,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "random": checkpointer.rng_states(run.ranks.device),
        "seed": run.seed,
        "epoch": state.epoch,
        "samples": state.images_in_epoch,
        "evaluated": state.epoch_evaluated,
        "step": state.step,
        "skipped_steps": int(state.skipped_steps),
        "global_batch_size": run.config.global_batch_size(run.ranks.world_size),
        "categories": [asdict(category) for category in state.categories],
        "written": dict(log_offsets),
        "config": to_json(run.config),
    }
    try:
        checkpointer.save(run.folder, epoch=state.epoch, step=state.step, score=score, state=content)
    except OSError as error:
        run.logger.print(f"warning: checkpoint after step {state.step} not saved: {error}")


def restore(state: TrainState, resume_point: ResumePoint, config: RunConfig, ranks: DistContext) -> None:
    """Restore the training state from a checkpoint. Raise InputError if it belongs to a different network.

    If the global batch size changed, the step is converted so that the number of images stays the same. Each rank gets
    its own batch-norm running statistics if the number of ranks is the same, otherwise the mean over ranks.
    """
    model, saved = ranks.unwrap(state.model), resume_point.state
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise InputError(
            f"{resume_point.path}: checkpoint of a different network ({str(error).splitlines()[-1].strip()}). "
            "Pass the settings of the run that wrote it."
        ) from error
    rows = saved["batch_norm"]
    sync_batch_norm.set_running_stats(model, rows[ranks.rank] if len(rows) == ranks.world_size else rows.mean(dim=0))
    resume.check_optimizer(config, resume_point.path, saved, state.optimizer.param_groups)
    # Hyperparameters are those of the settings, which may have changed, and of this device.
    groups = [
        group | {"params": saved_group["params"]}
        for group, saved_group in zip(state.optimizer.param_groups, saved["optimizer"]["param_groups"], strict=True)
    ]
    state.optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": groups})
    state.scaler.load_state_dict(saved["scaler"])
    state.epoch, state.images_in_epoch, state.epoch_evaluated = saved["epoch"], saved["samples"], saved["evaluated"]
    state.step = round(saved["step"] * saved["global_batch_size"] / config.global_batch_size(ranks.world_size))
    state.skipped_steps.fill_(saved.get("skipped_steps", 0))
    checkpointer.set_rng_states(saved["random"], ranks.device)
