"""A clone whose scripts run without an installation, and a small run in it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from paths import ROOT

PACKAGES = ("ssd", "maskrcnn", "retinanet", "detection", "mlperf")
FLAGS = (
    "--device cpu --precision fp32 --compile off --num-workers 0 --batch-size 2 --epochs 1 --target 0 --log-every 1 "
    "--warmup-steps 1 --eval-before-training --summary-json summary.json"
)


class Run(NamedTuple):
    """A finished run of ./run_and_time.sh: its clone, its folder and what it printed."""

    clone: Path
    folder: Path
    output: str


def make_clone(folder: Path) -> Path:
    """Copy the scripts and link the packages, with an environment that exists already."""
    for name in PACKAGES:
        (folder / name).symlink_to(ROOT / name)
    (folder / "scripts").symlink_to(ROOT / "scripts")
    for path in ROOT.glob("*.sh"):
        (folder / path.name).write_bytes(path.read_bytes())
        (folder / path.name).chmod(0o755)
    replace_environment(folder)
    return folder


def replace_environment(folder: Path) -> None:
    """Make a clone use this interpreter, and its setup.sh do nothing."""
    (folder / "setup.sh").write_text("#!/bin/sh\n")
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)


def run_command(
    command: str, clone: Path, *, timeout_s: float = 240, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run a shell command in a clone, without settings from this environment."""
    unset = ("SSD_", "MASKRCNN_", "DGX", "VENV", "RUN_DIR", "LOGDIR", "DATADIR", "NEXP")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    environment |= {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1", "DGXNGPU": "1", "CLEAR_CACHES": "0"}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=clone,
        env=environment | environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
