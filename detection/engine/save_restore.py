"""Training's state to a checkpoint, and back."""

from collections.abc import Mapping
from dataclasses import asdict

from detection.checkpoint import checkpointer
from detection.checkpoint.resume import Resumed
from detection.config.run_config import RunConfig
from detection.config.settings import InputError, to_json
from detection.engine.state import Run, State
from detection.runtime import sync_batch_norm
from detection.runtime.distributed import Ranks


def positions(run: Run) -> dict[str, int]:
    """How long the run's files are now, in bytes: the log's position, for a checkpoint."""
    return {"log": run.log.position(), "metrics": run.progress.position()}


def save(
    state: State, run: Run, written: Mapping[str, int], *, score: float | None = None, together: bool = True
) -> None:
    """Write a checkpoint, on the first rank; a disk that is full costs the checkpoint, not the run.

    together: all ranks are here, to tell what their batch norm has seen; else it is the same on all.
    """
    model = run.ranks.unwrap(state.model)
    rows = sync_batch_norm.statistics(model).unsqueeze(0)
    if together:
        rows = run.ranks.gather_rows(rows)
    if not run.ranks.is_first:
        return
    content = {
        "benchmark": run.config.benchmark,
        "model": model.state_dict(),
        "batch_norm": rows,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "random": checkpointer.random_states(run.ranks.device),
        "seed": run.seed,
        "epoch": state.epoch,
        "samples": state.samples,
        "evaluated": state.evaluated,
        "step": state.step,
        "global_batch_size": run.config.global_batch_size(run.ranks.world_size),
        "categories": [asdict(category) for category in state.categories],
        "written": dict(written),
        "config": to_json(run.config),
    }
    try:
        checkpointer.save(run.folder, epoch=state.epoch, step=state.step, score=score, state=content)
    except OSError as error:
        run.progress.say(f"warning: no checkpoint was saved after step {state.step}: {error}")


def restore(state: State, resumed: Resumed, config: RunConfig, ranks: Ranks) -> None:
    """Put training back to where a checkpoint was written; raises InputError where it is of another network.

    With another global batch the schedule goes on by samples: the step is that of as many images. Batch norm's
    running statistics are each rank's own where there are as many ranks, else the mean of them all.
    """
    model, saved = ranks.unwrap(state.model), resumed.state
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise InputError(
            f"{resumed.path}: the checkpoint is of another network ({str(error).splitlines()[-1].strip()})"
        ) from error
    rows = saved["batch_norm"]
    sync_batch_norm.set_statistics(model, rows[ranks.rank] if len(rows) == ranks.world_size else rows.mean(dim=0))
    try:
        state.optimizer.load_state_dict(saved["optimizer"])
    except ValueError as error:
        raise InputError(
            f"{resumed.path}: the checkpoint is of another optimiser ({error}). Give --weight-decay-on-bias-and-norm as it was"
        ) from error
    state.scaler.load_state_dict(saved["scaler"])
    state.epoch, state.samples, state.evaluated = saved["epoch"], saved["samples"], saved["evaluated"]
    state.step = round(saved["step"] * saved["global_batch_size"] / config.global_batch_size(ranks.world_size))
    checkpointer.set_random_states(saved["random"], ranks.device)
