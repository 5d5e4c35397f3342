"""Training on a fake third-party device gives the results of the CPU."""

import itertools
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils import backend_registration

import fake_privateuse1
import processes
from config_files import set_only
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


DEVICE = {"DUMMY_DEVICE": "auto"}
SERVER = """
import json, multiprocessing, sys
import torch._dynamo
from forked import run_program
fork = multiprocessing.get_context("fork")
for line in sys.stdin:
    programs = [fork.Process(target=run_program, args=arguments) for arguments in json.loads(line)]
    for program in programs:
        program.start()
    for program in programs:
        program.join()
    print(json.dumps([program.exitcode for program in programs]), flush=True)
"""


@pytest.fixture(scope="module")
def run_on_device(tmp_path_factory):
    """Function that runs programs at once, forked from one that has loaded the package of the device.

    It gets the words and the variables of each, and returns status, stdout and stderr of each.
    """
    folder = tmp_path_factory.mktemp("site")
    environ = os.environ | {"PYTHONPATH": f"{fake_privateuse1.install(folder)}:{ROOT}", "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}

    def run(*programs):
        outputs = [[tmp_path_factory.mktemp("output") / name for name in ("out", "err")] for _ in programs]
        for path in itertools.chain(*outputs):
            path.touch()
        jobs = [
            (list(map(str, words)), environ | variables, str(ROOT), *map(str, paths))
            for (words, variables), paths in zip(programs, outputs, strict=True)
        ]
        print(json.dumps(jobs), file=server.stdin, flush=True)
        statuses = json.loads(server.stdout.readline())
        return [
            (status, *(path.read_text() for path in paths)) for status, paths in zip(statuses, outputs, strict=True)
        ]

    with subprocess.Popen([sys.executable, "-c", SERVER], env=environ, **pipes) as server:
        yield run
        server.stdin.close()


def dummy_words(folder, *flags):
    return processes.command(folder, *SSD_SMALL, "--compile", "off", *flags)[1:]


def test_device_tensors_cannot_mix_with_cpu_tensors(run_on_device, tmp_path):
    (tmp_path / "program.py").write_text(
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
"""
    )
    ((status, stdout, stderr),) = run_on_device(([tmp_path / "program.py"], {}))
    assert status == 0, stderr
    assert stdout.splitlines() == ["standin:0 standin", "(2, 1) 9.0", "refused", "refused", "refused"]


def test_stopped_and_resumed_run_ends_as_on_the_cpu(run_on_device, tmp_path):
    folder = tmp_path / "device"
    assert processes.run(tmp_path / "cpu", *SSD_SMALL)[0] == 3
    ((status, _, err),) = run_on_device((dummy_words(folder, "--max-steps", "4"), DEVICE))
    assert status == 0, err
    (saved,) = run_dir.list_checkpoints(folder)[-1:]
    state = checkpointer.load(saved.path, benchmark="dummy")  # this process does not know the device
    assert state["step"] == 4
    assert "device" in state["random"], "not on the device"
    ((status, out, err),) = run_on_device((dummy_words(folder, "--resume", "auto", "--compile", "auto"), DEVICE))
    assert status == 3, err
    assert "not compiled: not possible on this machine" in out
    np.testing.assert_allclose(processes.losses(folder), processes.losses(tmp_path / "cpu"), rtol=1e-5)
    np.testing.assert_allclose(accuracies(folder), accuracies(tmp_path / "cpu"), rtol=1e-5)


def accuracies(folder):
    values = [evaluation["metrics"]["AP"] for evaluation in processes.metrics(folder, "evaluation")]
    assert len(values) == 3
    return values


def test_auto_precision_is_fp16_with_gradient_scaling(run_on_device, tmp_path):
    flags = ("--precision", "auto", "--num-workers", "1", "--epochs", "1")
    ((status, _, err),) = run_on_device((dummy_words(tmp_path / "run", *flags), {"DUMMY_DEVICE": "standin"}))
    assert status == 3, err
    (saved,) = run_dir.list_checkpoints(tmp_path / "run")
    assert checkpointer.load(saved.path, benchmark="dummy")["scaler"]["scale"] > 1


def test_two_ranks_without_a_collective_backend_are_rejected(run_on_device, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [group | {"RANK": rank, "LOCAL_RANK": rank, "DUMMY_DEVICE": "standin:0"} for rank in "01"]
    for status, _, err in run_on_device(*((dummy_words(tmp_path / "run"), rank) for rank in ranks)):
        assert status == 2
        assert "error: --device standin: this build of torch" in err
        assert "Traceback" not in err


def test_device_is_unknown_without_its_package(tmp_path):
    status, _, err = processes.run(tmp_path / "run", *SSD_SMALL, DUMMY_DEVICE="standin")
    assert status == 2
    assert "unknown device type" in err


def train_on_device(benchmark, flags, run_on_device, folder):
    """Run a complete training on the third-party device."""
    variables = {name: os.environ[name] for name in os.environ if name.startswith((benchmark.upper(), "DATADIR"))}
    words = ["-m", benchmark, "train", *flags, *DEVICE_CACHE, "--run-dir", str(folder)]
    ((status, _, err),) = run_on_device((words, variables))
    assert status == 0, err
    (saved,) = run_dir.list_checkpoints(folder)
    assert "device" in checkpointer.load(saved.path, benchmark=benchmark)["random"], "not on the device"


@pytest.mark.slow
def test_ssd300_trains_and_detects_as_on_the_cpu(run_on_device, tmp_path, monkeypatch):
    toy.generate(tmp_path / "data", toy.ToySpec(train_images=2, val_images=1, seed=1))
    set_only(monkeypatch, {"DATADIR": tmp_path / "data", "SSD_DATASET": "toy", "SSD_DIVISION": "open"})
    flags = ["--seed", "5", "--precision", "fp32", "--num-workers", "0", "--batch-size", "1", "--epochs", "2"]
    flags += ["--eval-epochs", "2", "--warmup-steps", "0", "--log-every", "1", "--compile", "off", "--target", "0"]
    flags += ["--base-lr", "0.0001"]  # the default rate amplifies rounding errors
    flags += ["--freeze-batch-norm"]  # batch norm over one image amplifies them, too
    assert train.main([*flags, "--device", "cpu", "--run-dir", str(tmp_path / "cpu")]) == 0
    train_on_device("ssd", flags, run_on_device, tmp_path / "device")
    np.testing.assert_allclose(processes.losses(tmp_path / "device"), processes.losses(tmp_path / "cpu"), rtol=1e-4)
    device_rows, cpu_rows = (
        json.loads((tmp_path / name / "detections.json").read_text()) for name in ("device", "cpu")
    )
    assert len(cpu_rows) > 0
    assert abs(len(device_rows) - len(cpu_rows)) <= len(cpu_rows) // 50  # tolerate scores at the threshold


@pytest.mark.slow
def test_mask_rcnn_trains_and_detects_as_on_the_cpu(run_on_device, four_image_coco, tmp_path, monkeypatch):
    set_only(monkeypatch, {f"MASKRCNN_{name}": value for name, value in SMALL.items()} | {"DATADIR": four_image_coco})
    flags = ["--precision", "fp32", "--compile", "off"]
    assert maskrcnn_train.main([*flags, "--run-dir", str(tmp_path / "cpu")]) == 0
    train_on_device("maskrcnn", flags, run_on_device, tmp_path / "device")
    np.testing.assert_allclose(processes.losses(tmp_path / "device"), processes.losses(tmp_path / "cpu"), rtol=1e-3)


@pytest.mark.parametrize(
    "parts",
    [
        ("retinanet_loss", "retinanet_decode", "retinanet_evaluation"),
        pytest.param(("resize", "detect", "evaluate", "end-to-end", "maskrcnn_evaluation"), marks=pytest.mark.slow),
    ],
)
def test_benchmarks_run_on_the_device(run_on_device, tmp_path, parts):
    flags = ("--tiny", "--allow-dirty", "--device", "standin", "--out", tmp_path / "results.json")
    ((status, _, err),) = run_on_device((["-m", "perf.run", *parts, *flags], {}))
    assert status == 0, err
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert {result["part"] for result in results} == set(parts)
