"""Fingerprint of training.

    python -m perf.fingerprint [--steps 60] [--out FILE] [--compare FILE]

Trains each workload for some steps on the toy data set with a fixed seed (float32, CPU, one thread), and hashes the
weights and the lines of the MLPerf log. Equal fingerprints of two commits on one machine prove that the second trains
as the first. Exits with 0, or 1 if the fingerprint differs from that of --compare.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from detection.engine.workload import EXIT_TARGET_NOT_REACHED
from mlperf import log, stdio
from perf.machine import ROOT

WORKLOADS: Mapping[str, tuple[str, Sequence[str]]] = {
    "ssd300-r34": ("ssd", ("--backbone", "resnet34")),
    "ssd300-r50": ("ssd", ("--network", "ssd300-r50", "--backbone", "resnet18")),
    "maskrcnn": ("maskrcnn", ()),
    "retinanet": ("retinanet", ()),
}
FLAGS = ("--seed", "7", "--precision", "fp32", "--device", "cpu", "--compile", "off")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "DGXSYSTEM": "toy"}
VARYING_KEYS = {"config", "commit"}  # folders of the run, and its commit
VARYING_METADATA = {"file", "lineno"}


def main(argv: list[str]) -> int:
    """Fingerprint the training of this checkout; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m perf.fingerprint", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each workload")
    parser.add_argument("--out", type=Path, help="write the fingerprint to this file")
    parser.add_argument("--compare", type=Path, help="compare with a fingerprint of as many steps")
    arguments = parser.parse_args(argv)
    expected = json.loads(arguments.compare.read_text()) if arguments.compare else None
    fingerprint = {}
    with tempfile.TemporaryDirectory(prefix="fingerprint-") as folder:
        for name, (package, flags) in WORKLOADS.items():
            run_dir = Path(folder) / name
            train(package, [*flags, "--max-steps", str(arguments.steps)], Path(folder), run_dir)
            fingerprint[name] = {"weights": hash_weights(run_dir), "log": log_lines(run_dir)}
            print(f"{name:<12} {fingerprint[name]['weights'][:16]}", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(fingerprint, indent=1) + "\n")
    if expected is None:
        return 0
    differing = [
        f"{name}: {part}"
        for name, parts in fingerprint.items()
        for part in parts
        if parts[part] != expected.get(name, {}).get(part)
    ]
    print("differs: " + ", ".join(differing) if differing else "the same")
    return 1 if differing else 0


def train(package: str, flags: Sequence[str], folder: Path, run_dir: Path) -> None:
    """Train a workload with the toy system's config file, on toy data in `folder`."""
    config = "config_toy.sh" if package == "ssd" else f"config_toy_{package}.sh"
    make_data = '[[ -e $DATADIR ]] || "$0" -m detection.synthetic.toy "$DATADIR"'
    script = f'set -e; {make_data}; . ./{config}; exec "$0" "$@"'
    command = ["bash", "-c", script, sys.executable, "-m", package, "train", *FLAGS, *flags]
    environment = os.environ | ENVIRONMENT | {"DATADIR": str(folder / "toy"), "RUN_DIR": str(run_dir)}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if process.returncode not in (0, EXIT_TARGET_NOT_REACHED):
        raise SystemExit(f"{package} train: exit status {process.returncode}\n{process.stdout}{process.stderr}")


def hash_weights(run_dir: Path) -> str:
    """Return the SHA-256 of names and values of all weights in the last checkpoint of a run."""
    (path,) = sorted((run_dir / "checkpoints").glob("*.pt"))[-1:]
    digest = hashlib.sha256()
    for name, tensor in torch.load(path, weights_only=True, map_location="cpu")["model"].items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def log_lines(run_dir: Path) -> list[list[Any]]:
    """Return key, value and metadata of each event of the MLPerf log, except those that differ between runs."""
    events = log.read(run_dir / "result_0.txt")
    return [
        [event.key, event.value, {k: v for k, v in event.metadata.items() if k not in VARYING_METADATA}]
        for event in events
        if event.key not in VARYING_KEYS
    ]


if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(main(sys.argv[1:]))
