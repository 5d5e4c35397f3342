"""Training on a fake third-party device gives the results of the CPU."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils import backend_registration

import fake_privateuse1
import processes
from detection import run_dir
from detection.checkpoint import checkpointer
from detection.synthetic import toy
from maskrcnn import train as maskrcnn_train
from paths import ROOT
from ssd import train
from tiny_maskrcnn import SMALL

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason=f"torch {torch.__version__} cannot be given a device without compiling one",
)

SSD_SMALL = ("--batch-size", "8", "--log-every", "1")
DEVICE_CACHE = ("--device", "auto", "--image-cache", "device", "--image-cache-gib", "0.1")


@pytest.fixture
def third_party(tmp_path):
    """PYTHONPATH with the package of the device installed."""
    return f"{fake_privateuse1.install(tmp_path / 'site')}:{ROOT}"


def python(text, **environment):
    """Run a Python program and return its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", text], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_device_tensors_cannot_mix_with_cpu_tensors(third_party):
    stdout = python(
        """
import torch
on_device = torch.arange(6.0).view(2, 3).to("standin")
print(on_device.device, torch.accelerator.current_accelerator())
print(on_device.t().contiguous().stride(), on_device[1:, 1:].sum().item())
cpu = torch.ones(2, 3)
for mix in (lambda: on_device + cpu, lambda: torch.cat([on_device, cpu]), lambda: on_device.numpy()):
    try:
        mix()
    except (RuntimeError, TypeError) as error:
        print("refused")
""",
        PYTHONPATH=third_party,
    )
    assert stdout.splitlines() == ["standin:0 standin", "(2, 1) 9.0", "refused", "refused", "refused"]


def test_stopped_and_resumed_run_ends_as_on_the_cpu(third_party, tmp_path):
    environment = {"PYTHONPATH": third_party, "DUMMY_DEVICE": "auto"}
    assert processes.run(tmp_path / "cpu", *SSD_SMALL)[0] == 3
    assert processes.run(tmp_path / "device", *SSD_SMALL, "--compile", "off", "--max-steps", "4", **environment)[0] == 0
    (saved,) = run_dir.list_checkpoints(tmp_path / "device")[-1:]
    state = checkpointer.load(saved.path, benchmark="dummy")  # this process does not know the device
    assert state["step"] == 4
    assert "device" in state["random"], "not on the device"
    status, out, err = processes.run(tmp_path / "device", *SSD_SMALL, "--resume", "auto", **environment)
    assert status == 3, err
    assert "not compiled: not possible on this machine" in out
    np.testing.assert_allclose(processes.losses(tmp_path / "device"), processes.losses(tmp_path / "cpu"), rtol=1e-5)
    np.testing.assert_allclose(accuracies(tmp_path / "device"), accuracies(tmp_path / "cpu"), rtol=1e-5)


def accuracies(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values = [line["metrics"]["AP"] for line in lines if line["event"] == "evaluation"]
    assert len(values) == 3
    return values


def test_auto_precision_is_fp16_with_gradient_scaling(third_party, tmp_path):
    flags = (*SSD_SMALL, "--precision", "auto", "--num-workers", "1", "--compile", "off", "--epochs", "1")
    status, _, err = processes.run(tmp_path / "run", *flags, PYTHONPATH=third_party, DUMMY_DEVICE="standin")
    assert status == 3, err
    (saved,) = run_dir.list_checkpoints(tmp_path / "run")
    assert checkpointer.load(saved.path, benchmark="dummy")["scaler"]["scale"] > 1


def test_two_ranks_without_a_collective_backend_are_rejected(third_party, tmp_path):
    environment = {"PYTHONPATH": third_party, "DUMMY_DEVICE": "standin:0"}
    status, _, err = processes.run(tmp_path / "run", *SSD_SMALL, ranks=2, **environment)
    assert status == 2
    assert "error: --device standin: this build of torch" in err
    assert "Traceback" not in err


def test_device_is_unknown_without_backend_autoload(third_party, tmp_path):
    environment = {"PYTHONPATH": third_party, "DUMMY_DEVICE": "standin", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    status, _, err = processes.run(tmp_path / "run", *SSD_SMALL, **environment)
    assert status == 2
    assert "unknown device type" in err


def train_on_device(benchmark, flags, third_party, folder):
    """Run a complete training on the third-party device."""
    command = [sys.executable, "-m", f"{benchmark}.train", *flags, *DEVICE_CACHE, "--run-dir", str(folder)]
    environment = os.environ | {"PYTHONPATH": third_party, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (saved,) = run_dir.list_checkpoints(folder)
    assert "device" in checkpointer.load(saved.path, benchmark=benchmark)["random"], "not on the device"


@pytest.mark.slow
def test_ssd300_trains_and_detects_as_on_the_cpu(third_party, tmp_path, monkeypatch):
    toy.generate(tmp_path / "data", toy.ToySpec(train_images=2, val_images=1, seed=1))
    values = {"DATADIR": str(tmp_path / "data"), "SSD_DATASET": "toy", "SSD_DIVISION": "open"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    flags = ["--seed", "5", "--precision", "fp32", "--num-workers", "0", "--batch-size", "1", "--epochs", "2"]
    flags += ["--eval-epochs", "2", "--warmup-steps", "0", "--log-every", "1", "--compile", "off", "--target", "0"]
    flags += ["--base-lr", "0.0001"]  # the default rate amplifies rounding errors
    flags += ["--freeze-batch-norm"]  # batch norm over one image amplifies them, too
    assert train.main([*flags, "--device", "cpu", "--run-dir", str(tmp_path / "cpu")]) == 0
    train_on_device("ssd", flags, third_party, tmp_path / "device")
    np.testing.assert_allclose(processes.losses(tmp_path / "device"), processes.losses(tmp_path / "cpu"), rtol=1e-4)
    device_rows, cpu_rows = (
        json.loads((tmp_path / name / "detections.json").read_text()) for name in ("device", "cpu")
    )
    assert len(cpu_rows) > 0
    assert abs(len(device_rows) - len(cpu_rows)) <= len(cpu_rows) // 50  # tolerate scores at the threshold


@pytest.mark.slow
def test_mask_rcnn_trains_and_detects_as_on_the_cpu(third_party, four_image_coco, tmp_path, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setenv(f"MASKRCNN_{name}", value)
    monkeypatch.setenv("DATADIR", str(four_image_coco))
    flags = ["--precision", "fp32", "--compile", "off"]
    assert maskrcnn_train.main([*flags, "--run-dir", str(tmp_path / "cpu")]) == 0
    train_on_device("maskrcnn", flags, third_party, tmp_path / "device")
    np.testing.assert_allclose(processes.losses(tmp_path / "device"), processes.losses(tmp_path / "cpu"), rtol=1e-3)
