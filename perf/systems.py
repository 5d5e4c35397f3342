"""Systems: the config files config_*.sh, and the settings and workload of each."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import maskrcnn.commands
import retinanet.commands
import ssd.commands
from detection.config.run_config import COCO_NUM_CLASSES, RunConfig
from perf.machine import ROOT

COMMANDS: Mapping[str, ModuleType] = {
    "ssd": ssd.commands,
    "maskrcnn": maskrcnn.commands,
    "retinanet": retinanet.commands,
}


def list_systems() -> list[str]:
    """Return the names of all systems, as in config_NAME.sh."""
    return sorted(path.stem.removeprefix("config_") for path in ROOT.glob("config_*.sh"))


def benchmark_of(system: str) -> str:
    """Return the benchmark that a system trains."""
    suffix = system.rpartition("_")[2]
    return suffix if suffix in COMMANDS else "ssd"


def exported(system: str, folder: Path = ROOT, **environ: str) -> dict[str, str]:
    """Return the environment after sourcing config_<system>.sh of a folder, given some variables."""
    script = f"source ./config_{system}.sh; exec env -0"
    environ = {"PATH": os.environ["PATH"], "DGXSYSTEM": system, **environ}
    shell = subprocess.run(["bash", "-euc", script], cwd=folder, env=environ, capture_output=True, check=True)
    return dict(line.split("=", 1) for line in shell.stdout.decode().strip("\0").split("\0"))


def exported_settings(system: str) -> dict[str, str]:
    """Return the settings of a system by variable, without those of its launch and its data."""
    prefix = f"{benchmark_of(system).upper()}_"
    return {name: value for name, value in exported(system).items() if name.startswith(prefix)}


def load_config(system: str, flags: Sequence[str] = ()) -> RunConfig:
    """Return the settings of a system, changed by flags, for COCO's classes if they depend on the data set."""
    load: Any = COMMANDS[benchmark_of(system)].PREFLIGHT.load
    config: RunConfig = load(list(flags), exported_settings(system)).config
    return config if config.num_classes else replace(config, num_classes=COCO_NUM_CLASSES)
