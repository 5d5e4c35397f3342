"""Variables that config files export, and the environment of runs in this process."""

import os
import subprocess
from pathlib import Path

import pytest

from paths import ROOT

VARIABLES = ("RUN_DIR", "NODE_RANK", "RUN_INDEX", "PAGE_CACHE_DROPPED", "ECHO_LOG")


def exported(system: str, folder: Path = ROOT, **environ: str) -> dict[str, str]:
    """Return the environment after sourcing config_<system>.sh."""
    script = f"source ./config_{system}.sh; exec env -0"
    environ = {"PATH": os.environ["PATH"], "DGXSYSTEM": system, **environ}
    shell = subprocess.run(["bash", "-euc", script], cwd=folder, env=environ, capture_output=True, check=True)
    return dict(line.split("=", 1) for line in shell.stdout.decode().strip("\0").split("\0"))


def set_only(patch: pytest.MonkeyPatch, settings: dict[str, object]) -> None:
    """Set these variables, and remove all other ones that are settings of a run."""
    for name in list(os.environ):
        if name.startswith(("SSD_", "MASKRCNN_", "DGX")) or name in VARIABLES:
            patch.delenv(name)
    for name, value in settings.items():
        patch.setenv(name, str(value))
