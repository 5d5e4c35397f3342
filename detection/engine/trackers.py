"""Optional trackers of a run's events: TensorBoard, Weights & Biases, MLflow. A package is imported only if requested.

metrics.jsonl holds the same numbers and more. A tracker that fails during a run is dropped, and the run continues.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from detection.config.run_config import RunConfig
from detection.config.settings import InputError, to_json

TRACKERS = ("tensorboard", "wandb", "mlflow")
"""Settings that request a tracker, which are also the names of the packages."""

# For each event: the field for the x-axis, and the fields to track.
SCALARS = {
    "step": ("step", ("loss", "lr", "images_per_s", "memory_gib")),
    "epoch": ("epoch", ("loss", "images_per_s", "seconds")),
    "evaluation": ("epoch", ("seconds",)),
}


def require_packages(config: RunConfig) -> None:
    """Raise InputError if the package of a requested tracker is not installed."""
    for name in TRACKERS:
        if not getattr(config, name):
            continue
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # without an origin, it is a folder of that name
            raise InputError(
                f"--{name}: the package {name} is not installed. Install it with .venv/bin/pip install {name}, or omit "
                "the flag: metrics.jsonl holds the same metrics."
            )


def select_scalars(event: str, values: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    """Return the place of an event on the x-axis, and its values as <event>/<name>, metrics by their own names."""
    if event not in SCALARS:
        return 0, {}
    x_field, fields = SCALARS[event]
    scalars = {name: values[name] for name in fields if name in values}
    scalars |= values.get("losses", {}) | values.get("metrics", {})
    return values[x_field], {f"{event}/{name}": value for name, value in scalars.items()}


class Tracker(Protocol):
    """Destination of a run's numbers."""

    def log(self, x: int, scalars: Mapping[str, float]) -> None:
        """Write numbers at a step or, for epochs and evaluations, an epoch."""

    def close(self) -> None:
        """Write what is pending, and close."""


class TensorBoardTracker:
    """Writer of TensorBoard's event files to a folder."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def log(self, x: int, scalars: Mapping[str, float]) -> None:
        """Write numbers."""
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, x)

    def close(self) -> None:
        """Flush and close."""
        self.writer.close()


class WandbTracker:
    """Run of Weights & Biases, whose files are in the run folder. `WANDB_MODE=offline` keeps it from the network."""

    def __init__(self, folder: Path, config: RunConfig):
        import wandb

        settings = json.loads(to_json(config))
        self.run = wandb.init(
            project=f"detection-{config.benchmark}", name=folder.name, dir=str(folder), config=settings
        )
        for event, (x_field, _) in SCALARS.items():  # each kind of event has an x-axis of its own
            self.run.define_metric(f"{event}/*", step_metric=f"{event}/{x_field}")

    def log(self, x: int, scalars: Mapping[str, float]) -> None:
        """Write numbers."""
        event = next(iter(scalars)).partition("/")[0]
        self.run.log({**scalars, f"{event}/{SCALARS[event][0]}": x})

    def close(self) -> None:
        """Upload what is pending."""
        self.run.finish()


class MlflowTracker:
    """Run of MLflow, in mlflow.db of the run folder unless `MLFLOW_TRACKING_URI` names a server or another store."""

    def __init__(self, folder: Path, config: RunConfig):
        import mlflow

        self.mlflow = mlflow
        if not mlflow.is_tracking_uri_set():
            mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        mlflow.set_experiment(f"detection-{config.benchmark}")
        mlflow.start_run(run_name=folder.name)
        mlflow.log_params(json.loads(to_json(config)))

    def log(self, x: int, scalars: Mapping[str, float]) -> None:
        """Write numbers."""
        self.mlflow.log_metrics(dict(scalars), step=x)

    def close(self) -> None:
        """End the run."""
        self.mlflow.end_run()


class TrackerGroup:
    """All trackers of a run. warnings: of those that failed, for the caller to print and clear."""

    def __init__(self, trackers: Sequence[Tracker] = ()):
        self.trackers = list(trackers)
        self.warnings: list[str] = []

    def log_event(self, event: str, values: Mapping[str, Any]) -> None:
        """Write the numbers of an event to each tracker."""
        x, scalars = select_scalars(event, values)
        for tracker in list(self.trackers) if scalars else ():
            with self.dropped_on_error(tracker):
                tracker.log(x, scalars)

    def close(self) -> None:
        """Close all trackers."""
        for tracker in list(self.trackers):
            with self.dropped_on_error(tracker):
                tracker.close()

    @contextmanager
    def dropped_on_error(self, tracker: Tracker) -> Iterator[None]:
        """Drop a tracker that fails, whatever its package raises: a run must not end because a server is down."""
        try:
            yield
        except Exception as error:
            self.trackers.remove(tracker)
            self.warnings.append(f"warning: {type(tracker).__name__} failed and gets no further events: {error}")


def open_trackers(config: RunConfig, folder: Path) -> TrackerGroup:
    """Return the trackers that the settings request. Raise InputError if one cannot be opened."""
    require_packages(config)
    trackers: list[Tracker] = []
    for name, make in (
        ("tensorboard", lambda: TensorBoardTracker(folder / "tensorboard")),
        ("wandb", lambda: WandbTracker(folder, config)),
        ("mlflow", lambda: MlflowTracker(folder, config)),
    ):
        if getattr(config, name):
            try:
                trackers.append(make())
            except Exception as error:  # the packages have no common base
                raise InputError(
                    f"--{name}: cannot be opened ({error}). Correct its settings, or omit the flag."
                ) from error
    return TrackerGroup(trackers)
