"""Events for TensorBoard, on request: the package is no dependency, and nothing of it is loaded without."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from detection.config.settings import InputError

# Which values of an event are drawn, and over which of its fields.
SCALARS = {
    "step": ("step", ("loss", "lr", "images_per_s")),
    "epoch": ("epoch", ("loss", "images_per_s", "seconds")),
    "evaluation": ("epoch", ("seconds",)),
}


def require() -> None:
    """Raise InputError where the package is not installed."""
    if find_spec("tensorboard") is None:
        raise InputError(
            "--tensorboard: the package tensorboard is not installed. Install it with .venv/bin/pip install "
            "tensorboard, or leave the flag out: metrics.jsonl holds the same figures"
        )


class Board:
    """Draws the events of a run into a folder that TensorBoard reads."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter  # not before it is known to be there

        self.writer = SummaryWriter(str(folder))

    def add(self, event: str, values: Mapping[str, Any]) -> None:
        """Draw what an event says, as <event>/<name>; the figures of an evaluation each by its own name."""
        if event not in SCALARS:
            return
        over, names = SCALARS[event]
        shown = {name: values[name] for name in names} | values.get("metrics", {})
        for name, value in shown.items():
            self.writer.add_scalar(f"{event}/{name}", value, values[over])

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()
