"""A device of a third party, one that is not: the loop does on it what it does on the CPU."""

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
MADE_THERE = ("--device", "auto", "--image-cache", "device", "--image-cache-gib", ".1")


@pytest.fixture
def third_party(tmp_path):
    """PYTHONPATH of a machine on which the package of the device is installed."""
    return f"{fake_privateuse1.install(tmp_path / 'site')}:{ROOT}"


def python(text, **environment):
    """What a program says."""
    done = subprocess.run(
        [sys.executable, "-c", text], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_tensors_are_none_of_the_cpu(third_party):
    said = python(
        """
import torch
there = torch.arange(6.0).view(2, 3).to("standin")
print(there.device, torch.accelerator.current_accelerator())
print(there.t().contiguous().stride(), there[1:, 1:].sum().item())
for mix in (lambda: there + torch.ones(2, 3), lambda: torch.cat([there, torch.ones(2, 3)]), lambda: there.numpy()):
    try:
        mix()
    except (RuntimeError, TypeError) as error:
        print("refused")
""",
        PYTHONPATH=third_party,
    )
    assert said.splitlines() == ["standin:0 standin", "(2, 1) 9.0", "refused", "refused", "refused"]


def test_a_run_there_is_stopped_resumed_and_ends_as_on_the_cpu(third_party, tmp_path):
    there = {"PYTHONPATH": third_party, "STANDIN_DEVICE": "auto"}
    assert processes.run(tmp_path / "cpu", *SMALL)[0] == 3
    assert processes.run(tmp_path / "there", *SMALL, "--compile", "off", "--max-steps", "4", **there)[0] == 3
    (saved,) = run_dir.checkpoints(tmp_path / "there")[-1:]
    state = checkpointer.load(saved.path, benchmark="stand_in")  # by this process, which knows no such device
    assert state["step"] == 4
    assert "device" in state["random"], "it was not on the device"
    status, out, err = processes.run(tmp_path / "there", *SMALL, "--resume", "auto", **there)
    assert status == 3, err
    assert "not compiled, since that is not possible here" in out
    np.testing.assert_allclose(processes.losses(tmp_path / "there"), processes.losses(tmp_path / "cpu"), rtol=1e-5)
    np.testing.assert_allclose(accuracies(tmp_path / "there"), accuracies(tmp_path / "cpu"), rtol=1e-5)


def accuracies(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line["metrics"]["AP"] for line in lines if line["event"] == "evaluation"]
    assert len(found) == 3
    return found


def test_auto_is_fp16_with_scaled_gradients_there_and_batches_come_from_workers(third_party, tmp_path):
    flags = (*SMALL, "--precision", "auto", "--num-workers", "1", "--compile", "off", "--epochs", "1")
    status, _, err = processes.run(tmp_path / "run", *flags, PYTHONPATH=third_party, STANDIN_DEVICE="standin")
    assert status == 3, err
    (saved,) = run_dir.checkpoints(tmp_path / "run")
    assert checkpointer.load(saved.path, benchmark="stand_in")["scaler"]["scale"] > 1


def test_ranks_that_could_not_speak_to_each_other_there_are_told_so(third_party, tmp_path):
    there = {"PYTHONPATH": third_party, "STANDIN_DEVICE": "standin:0"}
    status, _, err = processes.run(tmp_path / "run", *SMALL, ranks=2, **there)
    assert status == 2
    assert "error: --device standin: ranks cannot speak to each other" in err
    assert "Traceback" not in err


def test_a_machine_that_loads_no_packages_of_third_parties_refuses_the_device(third_party, tmp_path):
    there = {"PYTHONPATH": third_party, "STANDIN_DEVICE": "standin", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    status, _, err = processes.run(tmp_path / "run", *SMALL, **there)
    assert status == 2
    assert "knows no such device" in err


def train_there(benchmark, flags, third_party, folder):
    """A whole run on the third party's device."""
    command = [sys.executable, "-m", f"{benchmark}.train", *flags, *MADE_THERE, "--run-dir", str(folder)]
    environment = os.environ | {"PYTHONPATH": third_party, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (saved,) = run_dir.checkpoints(folder)
    assert "device" in checkpointer.load(saved.path, benchmark=benchmark)["random"], "it was not on the device"


@pytest.mark.slow
def test_ssd300_trains_and_detects_there_as_on_the_cpu(third_party, tmp_path, monkeypatch):
    toy.draw(tmp_path / "data", toy.Drawing(train_images=2, val_images=1, seed=1))
    values = {"DATADIR": str(tmp_path / "data"), "SSD_DATASET": "toy", "SSD_DIVISION": "open"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    flags = ["--seed", "5", "--precision", "fp32", "--num-workers", "0", "--batch-size", "1", "--epochs", "2"]
    flags += ["--eval-epochs", "2", "--warmup-steps", "0", "--log-every", "1", "--compile", "off", "--target", "0"]
    flags += ["--base-lr", ".0001"]  # steps as large as the usual ones make much of a rounding
    flags += ["--freeze-batch-norm"]  # and over one image so does this
    assert train.main([*flags, "--device", "cpu", "--run-dir", str(tmp_path / "cpu")]) == 0
    train_there("ssd", flags, third_party, tmp_path / "there")
    np.testing.assert_allclose(processes.losses(tmp_path / "there"), processes.losses(tmp_path / "cpu"), rtol=1e-4)
    there, here = (json.loads((tmp_path / name / "detections.json").read_text()) for name in ("there", "cpu"))
    assert len(here) > 0
    assert abs(len(there) - len(here)) <= len(here) // 50  # scores on the threshold


@pytest.mark.slow
def test_mask_rcnn_trains_and_detects_there_as_on_the_cpu(third_party, handful, tmp_path, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setenv(f"MASKRCNN_{name}", value)
    monkeypatch.setenv("DATADIR", str(handful))
    flags = ["--precision", "fp32", "--compile", "off"]
    assert maskrcnn_train.main([*flags, "--run-dir", str(tmp_path / "cpu")]) == 0
    train_there("maskrcnn", flags, third_party, tmp_path / "there")
    np.testing.assert_allclose(processes.losses(tmp_path / "there"), processes.losses(tmp_path / "cpu"), rtol=1e-3)
