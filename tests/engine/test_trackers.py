"""Trackers of a run: what they get, and how a missing or failing one is reported."""

import importlib.util
import math
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch

import commands
from detection.config.settings import InputError
from detection.engine import trackers
from detection.engine.run_logger import RunLogger
from detection.engine.trackers import TrackerGroup, open_trackers
from detection.runtime.distributed import DistContext
from ssd.config import load

STEP = {"step": 7, "epoch": 1, "loss": 2.5, "lr": 0.1, "images_per_s": 9.0, "memory_gib": 2.0, "losses": {"box": 1.5}}
EVALUATION = {"epoch": 2, "seconds": 3.0, "metrics": {"AP": 0.2}}
STEP_SCALARS = {"step/loss": 2.5, "step/lr": 0.1, "step/images_per_s": 9.0, "step/memory_gib": 2.0, "step/box": 1.5}
EVALUATION_SCALARS = {"evaluation/seconds": 3.0, "evaluation/AP": 0.2}


def config_of(*flags: str):
    return load(list(flags), {}).config


def log_run(group: TrackerGroup) -> None:
    group.log_event("run_start", {"seed": 1})
    group.log_event("step", STEP)
    group.log_event("evaluation", EVALUATION)
    group.close()


def install(monkeypatch, name: str, **members: object) -> None:
    """Install a fake package."""
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, origin="fake")
    for member, value in members.items():
        setattr(module, member, value)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_missing_package_is_named_before_the_run(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    assert commands.ssd("preflight", f"--{name}", "--run-dir", tmp_path / "run", "--data-dir", tmp_path) == 2
    shown = capsys.readouterr().err
    assert f"--{name}: the package {name} is not installed" in shown
    assert "Traceback" not in shown
    with pytest.raises(InputError, match=f"pip install {name}"):
        open_trackers(config_of(f"--{name}"), tmp_path)


def test_tensorboard_gets_every_number(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, folder):
            calls.append(folder)

        def add_scalar(self, name, value, x):
            calls.append((name, value, x))

        def close(self):
            calls.append("closed")

    install(monkeypatch, "tensorboard")
    install(monkeypatch, "torch.utils.tensorboard", SummaryWriter=Writer)
    log_run(open_trackers(config_of("--tensorboard"), tmp_path))
    assert calls[0] == str(tmp_path / "tensorboard")
    assert calls[1:-1] == [(name, value, 7) for name, value in STEP_SCALARS.items()] + [
        (name, value, 2) for name, value in EVALUATION_SCALARS.items()
    ]
    assert calls[-1] == "closed"


def test_wandb_gets_every_number_on_the_axis_of_its_event(tmp_path, monkeypatch):
    calls, axes = [], {}

    class Run:
        def define_metric(self, name, step_metric):
            axes[name] = step_metric

        def log(self, values):
            calls.append(values)

        def finish(self):
            calls.append("finished")

    def init(**options):
        calls.append(options)
        return Run()

    install(monkeypatch, "wandb", init=init)
    log_run(open_trackers(config_of("--wandb", "--batch-size", "3"), tmp_path))
    assert calls[0]["config"]["batch_size"] == 3
    assert (calls[0]["project"], calls[0]["dir"]) == ("detection-ssd", str(tmp_path))
    assert calls[1:] == [{**STEP_SCALARS, "step/step": 7}, {**EVALUATION_SCALARS, "evaluation/epoch": 2}, "finished"]
    assert axes == {"step/*": "step/step", "epoch/*": "epoch/epoch", "evaluation/*": "evaluation/epoch"}


@pytest.mark.parametrize("has_uri", [True, False])
def test_mlflow_gets_every_number_in_the_run_folder_or_at_the_uri(tmp_path, monkeypatch, has_uri):
    calls = []
    members = {
        name: lambda *words, name=name, **options: calls.append((name, *words, options))
        for name in ("set_tracking_uri", "set_experiment", "start_run", "log_params", "log_metrics", "end_run")
    }
    install(monkeypatch, "mlflow", is_tracking_uri_set=lambda: has_uri, **members)
    log_run(open_trackers(config_of("--mlflow"), tmp_path))
    uris = [call for call in calls if call[0] == "set_tracking_uri"]
    assert uris == ([] if has_uri else [("set_tracking_uri", f"sqlite:///{tmp_path.resolve()}/mlflow.db", {})])
    assert [call for call in calls if call[0] in ("log_metrics", "end_run")] == [
        ("log_metrics", STEP_SCALARS, {"step": 7}),
        ("log_metrics", EVALUATION_SCALARS, {"step": 2}),
        ("end_run", {}),
    ]


class Failing:
    def log(self, x, scalars):
        raise ConnectionError("the server is down")

    def close(self):
        raise AssertionError("a dropped tracker is not closed")


def test_failing_tracker_is_dropped_and_the_run_goes_on(tmp_path, capsys):
    logger = RunLogger(
        DistContext(0, 1, torch.device("cpu")),
        tmp_path / "metrics.jsonl",
        log_every=1,
        trackers=TrackerGroup([Failing()]),
    )
    for _ in range(2):
        logger.write_event("step", **STEP)
    logger.close()
    assert capsys.readouterr().out.count("Failing failed and gets no further events: the server is down") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_tracker_that_cannot_be_opened_is_reported(tmp_path, monkeypatch):
    def init(**_):
        raise RuntimeError("no API key")

    install(monkeypatch, "wandb", init=init)
    with pytest.raises(InputError, match=r"--wandb: cannot be opened \(no API key\)"):
        open_trackers(config_of("--wandb"), tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_writes_offline_into_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_run(open_trackers(config_of("--wandb"), tmp_path))
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"evaluation/AP" in file.read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_writes_offline_into_the_run_folder(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    log_run(open_trackers(config_of("--mlflow"), tmp_path))
    (run,) = mlflow.search_runs(experiment_names=["detection-ssd"], output_format="list")
    assert run.data.metrics["evaluation/AP"] == 0.2
    assert math.isclose(run.data.metrics["step/loss"], 2.5)
    assert run.data.params["batch_size"]
