"""Tests of whole RetinaNet runs: logs, results, resume and settings."""

import json

import pytest
import torch

import processes
import small_runs
from commands import retinanet
from config_files import exported
from detection import run_dir
from detection.preflight.run_checks import check_rules
from mlperf import compliance
from mlperf.log import read
from mlperf.rules import BENCHMARKS, hyperparameter_keys, tensor_names
from paths import ROOT
from retinanet import train
from retinanet.commands import rule_values
from retinanet.config import load
from retinanet.loss import LOSS_NAMES
from small_runs import load_weights
from tiny_retinanet import SMALL

uninterrupted_run, run = small_runs.make_fixtures("RETINANET", SMALL, train.main)


class TestModes(small_runs.SharedTests):
    """Evaluation of a checkpoint, and benchmarks."""


def test_run_writes_a_log_that_every_ruleset_accepts(uninterrupted_run):
    folder, output = uninterrupted_run
    events = read(folder / "result_0.txt")
    logged = [event.key for event in events]
    for key in hyperparameter_keys("retinanet"):
        assert logged.count(key) == 1, key
    tensors = [event.metadata["tensor"] for event in events if event.key == "weights_initialization"]
    assert tensors == tensor_names("retinanet")
    verdict = compliance.check(folder / "result_0.txt", "5.1.0")
    assert verdict.passed, verdict.messages
    steps = processes.metrics(folder, "step")
    assert [tuple(step["losses"]) for step in steps] == [LOSS_NAMES] * 2
    assert json.loads((folder / "detections.json").read_text()) is not None
    assert "pycocotools confirms the final metrics" in output


@pytest.mark.parametrize("ruleset", BENCHMARKS["retinanet"].names)
def test_name_in_the_log_follows_the_ruleset(run, ruleset):
    _, folder = run("--ruleset", ruleset, "--max-steps", "1")
    (name,) = [event.value for event in read(folder / "result_0.txt") if event.key == "submission_benchmark"]
    assert name == ("retinanet" if ruleset.startswith("5") else "ssd")


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_resumed_run_reaches_identical_weights(run, optimizer):
    flags = ("--optimizer", optimizer, "--weight-decay", "0.01")
    _, whole = run(*flags, name="whole")
    status, folder = run(*flags, "--max-steps", "1", name="interrupted")
    assert status == 0
    assert run(*flags, "--resume", "auto", name="interrupted")[0] == 0
    actual, expected = load_weights(folder), load_weights(whole)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_predict_draws_and_writes_detections(uninterrupted_run, four_image_coco, tmp_path):
    checkpoint = run_dir.list_checkpoints(uninterrupted_run[0])[-1].path
    images = sorted((four_image_coco / "val2017").iterdir())
    assert retinanet("predict", checkpoint, *images, "--folder", tmp_path / "out", "--score", "0.001") == 0
    assert len(list((tmp_path / "out").glob("*.jpg")) + list((tmp_path / "out").glob("*.png"))) >= len(images)


@pytest.mark.parametrize("path", sorted(ROOT.glob("config_*_retinanet.sh")), ids=lambda path: path.stem)
def test_config_files_pass_the_rules(path):
    environment = exported(path.stem.removeprefix("config_"))
    config = load([], environment).config
    world_size = int(environment["DGXNGPU"])
    _, violations = check_rules(config, rule_values(config, world_size), world_size)
    if "toy" in path.stem:
        assert config.division == "open"
    elif "CPU" not in path.stem:
        assert not violations


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (("--optimizer", "adamw"), "opt_name"),
        (("--weight-decay", "1e-4"), "opt_weight_decay"),
        (("--warmup-epochs", "0.5"), "opt_learning_rate_warmup_epochs"),
        (("--image-size", "640"), "image_size"),
        (("--pyramid-channels", "64"), "pyramid_channels"),
        (("--head-init-std", "0.03"), "head_init_std"),
        (("--no-train-crowds",), "train_crowds"),
        (("--target", "0.3"), "target"),
        (("--eval-epochs", "every 2"), "eval_epochs"),
        (("--dataset", "coco2017"), "dataset"),
    ],
)
def test_closed_division_names_the_broken_rule(flags, rule):
    config = load(["--batch-size", "32", "--pretrained-backbone", "x.pth", *flags], {}).config
    _, violations = check_rules(config, rule_values(config, 8), 8)
    assert len(violations) == 1
    assert rule in violations[0]
