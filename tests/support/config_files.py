"""Variables that config files export."""

import os
import subprocess

from paths import ROOT


def exported(system: str, **environ: str) -> dict[str, str]:
    """Return the environment after sourcing config_<system>.sh."""
    script = f"source ./config_{system}.sh; exec env -0"
    environ = {"PATH": os.environ["PATH"], "DGXSYSTEM": system, **environ}
    shell = subprocess.run(["bash", "-euc", script], cwd=ROOT, env=environ, capture_output=True, check=True)
    return dict(line.split("=", 1) for line in shell.stdout.decode().strip("\0").split("\0"))
