"""Checkpoints of networks that were not trained."""

from pathlib import Path

from torch import nn

from detection.checkpoint import checkpointer
from detection.config.run_config import RunConfig
from detection.config.settings import to_json
from detection.runtime import sync_batch_norm

CATEGORY_NAMES = ("disc", "square", "triangle")


def write_checkpoint(folder: Path, model: nn.Module, config: RunConfig, **extra) -> Path:
    state = {
        "benchmark": config.benchmark,
        "model": model.state_dict(),
        "batch_norm": sync_batch_norm.running_stats(model).unsqueeze(0),
        "config": to_json(config),
        "categories": [{"id": label, "name": name} for label, name in enumerate(CATEGORY_NAMES, start=1)],
    }
    return checkpointer.save(folder, epoch=1, step=1, score=0.0, state=state | extra)
