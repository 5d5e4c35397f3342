"""Metadata of a run: what trains, on what, and to which target."""

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from detection.data.batch import Batch
from detection.engine.state import RunContext, TrainState
from detection.engine.workload import Workload
from detection.runtime import device
from mlperf import system_desc
from mlperf.log import MlperfLog

NAMES_OF_A_RUN = ("run_dir", "run_index", "log_dir", "summary_json", "resume")
"""Settings that differ between the runs of one system."""


def log_hyperparameters(
    log: MlperfLog, hyperparameters: Mapping[str, object], read_tensor_names: Callable[[], Iterable[str]]
) -> None:
    """Log the hyperparameters by MLPerf's keys, and the name of each tensor that was initialized."""
    for key, value in hyperparameters.items():
        log.event(key, value)
    for name in read_tensor_names():
        log.event("weights_initialization", tensor=name)


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
        "packages": installed_packages(),
        "machine": system_desc.system_summary(),
        "seed": run.seed,
        "global_batch_size": config.global_batch_size(ranks.world_size),
        "epochs": config.epochs,
        "targets": dict(workload.targets),
        "loss_names": list(workload.loss_names),
        "flags": [name for name in run.flags if name not in NAMES_OF_A_RUN],
        "resumed_from": run.resume_point.path.name if run.resume_point else None,
    }


def installed_packages() -> str:
    """Return where the packages of this environment come from, as setup.sh recorded it: a hash of constraints.txt."""
    try:
        return (Path(sys.prefix) / ".packages").read_text().strip()
    except OSError:
        return "unknown"
