"""Optional TensorBoard events. The package is imported only with --tensorboard."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from detection.config.settings import InputError

# For each event: the field for the x-axis, and the fields to plot.
SCALARS = {
    "step": ("step", ("loss", "lr", "images_per_s")),
    "epoch": ("epoch", ("loss", "images_per_s", "seconds")),
    "evaluation": ("epoch", ("seconds",)),
}


def require_tensorboard() -> None:
    """Raise InputError if the package tensorboard is not installed."""
    if find_spec("tensorboard") is None:
        raise InputError(
            "--tensorboard: the package tensorboard is not installed. Install it with .venv/bin/pip install "
            "tensorboard, or omit the flag: metrics.jsonl holds the same metrics."
        )


class TensorBoardLogger:
    """Writer of a run's events for TensorBoard."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter  # optional package

        self.writer = SummaryWriter(str(folder))

    def log_event(self, event: str, values: Mapping[str, Any]) -> None:
        """Write the values of an event as <event>/<name>, and every metric of an evaluation by its own name."""
        if event not in SCALARS:
            return
        step_field, fields = SCALARS[event]
        scalars = {name: values[name] for name in fields} | values.get("metrics", {})
        for name, value in scalars.items():
            self.writer.add_scalar(f"{event}/{name}", value, values[step_field])

    def close(self) -> None:
        """Flush and close."""
        self.writer.close()
