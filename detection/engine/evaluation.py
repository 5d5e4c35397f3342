"""Evaluation of the current model, within a run or on its own."""

from collections.abc import Mapping

from detection.data.batch import Batch
from detection.engine.initialization import build_state
from detection.engine.metadata import run_metadata
from detection.engine.model_mode import eval_mode
from detection.engine.state import RunContext, TrainState
from detection.engine.workload import EvalSource, TrainResult, Workload


def evaluate_only(workload: Workload[Batch], run: RunContext) -> TrainResult:
    """Evaluate the initial weights, without training and without an MLPerf log."""
    state = build_state(workload, run.config, run.ranks)
    run.logger.start_run(run_metadata(workload, run, state))
    data = workload.make_eval_source()
    metrics = evaluate_initial(state, data, workload, run)
    result = TrainResult(targets_met(metrics, workload.targets), 0, metrics)
    finish(result, state, data, workload, run)
    return result


def evaluate_initial(
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


def finish(
    result: TrainResult, state: TrainState, data: EvalSource, workload: Workload[Batch], run: RunContext
) -> None:
    """End the timed part, evaluate the other choice of --eval-images, and write the summary even if that fails."""
    run.logger.stop_timer()
    other = None
    try:
        with eval_mode(state, run) as model:
            other = workload.evaluate_other(model, data)
    finally:
        run.logger.finish(converged=result.target_reached, other_eval_images=other and other._asdict())
    if other:
        metrics = ", ".join(f"{name} {other.metrics[name]:.4f}" for name in workload.targets)
        run.logger.print(f"with --eval-images {other.eval_images} ({other.images} images): {metrics}")


def targets_met(metrics: Mapping[str, float], targets: Mapping[str, float]) -> bool:
    """Return whether every target is met. Without metrics, none is."""
    return bool(metrics) and all(metrics[name] >= target for name, target in targets.items())
