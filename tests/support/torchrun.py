"""Runs of SSD300 under the launcher."""

import os
import subprocess
import sys

from paths import ROOT


def launch(ranks, run, *flags):
    command = [
        sys.executable,
        "-m",
        "detection.runtime.launch",
        "--nproc-per-node",
        str(ranks),
        "-m",
        "ssd",
        "train",
        *flags,
    ]
    environment = os.environ | {"RUN_DIR": str(run), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
