"""Programs under the launcher."""

import os
from subprocess import CompletedProcess

import processes
from forked import Forked
from paths import ROOT

FULL_SSD300 = ("-m", "ssd", "train")
NARROW_SSD300 = (str(ROOT / "tests/support/narrow_ssd.py"),)


def run_ranks(ranks: int, *words: object, **variables: str) -> CompletedProcess[str]:
    """Run a program on several ranks. words: its path, or "-m" and its module, and its arguments."""
    command = ["-m", "detection.runtime.launch", "--nproc-per-node", str(ranks), *map(str, words)]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": processes.SEARCH_PATH} | variables
    return CompletedProcess(command, *processes.finish(Forked(command, environ), timeout_s=240))


def launch(ranks, run, *flags, program=FULL_SSD300):
    """Train SSD300."""
    return run_ranks(ranks, *program, *flags, RUN_DIR=str(run))
