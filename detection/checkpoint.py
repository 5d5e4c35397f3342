"""Checkpoints: what training has reached, written so that a file is whole or not there."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

NAME = re.compile(r"epoch_(\d+)_ap_(\d\.\d+)\.pt")


def save(folder: Path, epoch: int, average_precision: float, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint named by epoch and AP, and keep of the older ones only the best.

    The file is written to the side, synced and renamed, so that a crash leaves no torn one behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"epoch_{epoch:04d}_ap_{max(0.0, average_precision):.4f}.pt"
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    prune(folder, keep=path)
    return path


def prune(folder: Path, keep: Path) -> None:
    """Remove all checkpoints of a folder but one and the best."""
    scores = {path: float(match[2]) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))}
    best = max(scores, key=lambda path: scores[path])
    for path in scores:
        if path not in (keep, best):
            path.unlink()
