"""Tuning: the search with fake measurements, and trials in real processes."""

import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import commands
from config_files import exported, set_only
from detection.config.settings import InputError, LaunchLayout
from detection.preflight import run_checks
from detection.tuning import config_file, search, trial
from detection.tuning.search import SearchAxis, Searcher
from detection.tuning.trial import Trial
from paths import ROOT
from retinanet import commands as retinanet_commands
from retinanet import config as retinanet_config
from ssd.commands import rule_values
from ssd.config import Config, load

BASE = {
    "batch_size": "4",
    "grad_accum_steps": "1",
    "num_workers": "1",
    "precision": "auto",
    "compile": "auto",
    "image_cache": "none",
    "jpeg_decoder": "cpu",
}


def measured(settings, rate):
    return Trial(settings, "measured", elapsed_s=0.0, images_per_s=rate, step_ms=1e6, precision="bf16")


def make_searcher(rates, seconds=100.0):
    """Create a searcher with fake measurements. `rates` maps settings to a rate, or to the status of a failure."""
    requested = []

    def measure(settings, steps, warmup, limit_s):
        requested.append(dict(settings))
        rate = rates(settings)
        return Trial(settings, rate, 0.0, reason="why") if isinstance(rate, str) else measured(settings, rate)

    searcher = Searcher(measure, lambda trial: 1 / trial.images_per_s, time.monotonic() + seconds)
    return searcher, requested


def test_axis_is_searched_while_it_is_faster():
    searcher, requested = make_searcher(
        lambda settings: {"2": 2.0, "4": 3.0, "8": 3.05, "16": 9.0}[settings["num_workers"]]
    )
    best = searcher.hill_climb(measured(BASE, 1.0), SearchAxis("num_workers", ("2", "4", "8", "16")))
    assert best.settings["num_workers"] == "4"  # 8 is less than 3% faster
    assert [settings["num_workers"] for settings in requested] == ["2", "4", "8"]


@pytest.mark.parametrize("status", ["out of memory", "failed", "out of time"])
def test_failed_trial_ends_only_its_axis(status, capsys):
    searcher, requested = make_searcher(
        lambda settings: status if settings["batch_size"] == "16" else float(settings["batch_size"])
    )
    best = searcher.hill_climb(measured(BASE, 1.0), SearchAxis("batch_size", ("8", "16", "32")))
    assert best.settings["batch_size"] == "8"
    assert len(requested) == 2
    assert status in capsys.readouterr().out
    assert searcher.hill_climb(best, SearchAxis("batch_size", ("64",))).settings["batch_size"] == "64"


def test_axis_without_adopt_is_only_measured():
    searcher, requested = make_searcher(lambda _: 50.0)
    best = measured(BASE, 1.0)
    assert searcher.hill_climb(best, SearchAxis("batch_size", ("8",), adopt=False)) is best
    assert len(requested) == 1


def test_trial_that_exceeds_the_budget_does_not_start():
    searcher, requested = make_searcher(lambda _: 1.0, seconds=10)
    searcher.trials.append(replace(measured(BASE, 1.0), elapsed_s=9.5))
    assert searcher.run_trial(BASE) is None
    searcher.trials[0] = replace(searcher.trials[0], elapsed_s=5)
    assert searcher.run_trial(BASE)
    assert len(requested) == 1


def test_batch_that_does_not_fit_is_split_into_micro_batches():
    searcher, _ = make_searcher(lambda settings: 1.0 if settings["grad_accum_steps"] == "4" else "out of memory")
    assert search.find_baseline(searcher, dict(BASE)).settings["grad_accum_steps"] == "4"
    failing, _ = make_searcher(lambda _: "out of memory")
    with pytest.raises(InputError, match="smaller --batch-size"):
        search.find_baseline(failing, dict(BASE))


@pytest.mark.parametrize(("status", "message"), [("failed", "failed: why"), ("out of time", "more seconds")])
def test_failed_first_trial_raises_input_error(status, message):
    searcher, _ = make_searcher(lambda _: status)
    with pytest.raises(InputError, match=message):
        search.find_baseline(searcher, dict(BASE))


def test_short_steps_are_repeated_more_often():
    searcher, requested = make_searcher(lambda _: 1.0)
    searcher.measure = lambda settings, steps, *_: (
        requested.append(steps) or replace(measured(settings, 1.0), step_ms=100)
    )
    search.find_baseline(searcher, dict(BASE))
    assert requested == [search.FIRST_STEPS, 49]  # a twentieth of 100 s, in steps of 0.1 s


def test_image_cache_is_measured_only_if_time_allows(capsys):
    searcher, requested = make_searcher(lambda _: 2.0)
    best = replace(measured(BASE, 1.0), step_ms=1000)
    assert search.try_image_cache(searcher, best, 1000, ["host"]) is best
    assert "not measured" in capsys.readouterr().out
    assert search.try_image_cache(searcher, best, 10, ["host"]).settings["image_cache"] == "host"
    assert len(requested) == 1


def test_fastest_cache_memory_is_adopted():
    rates = {"none": 1.0, "host": 2.0, "device": 3.0}
    searcher, requested = make_searcher(lambda settings: rates[settings["image_cache"]])
    best = replace(measured(BASE | {"jpeg_decoder": "gpu"}, 1.0), step_ms=1)
    best = search.try_image_cache(searcher, best, 10, ["host", "device"])
    assert best.settings["image_cache"] == "device"
    assert [(settings["image_cache"], settings["jpeg_decoder"]) for settings in requested] == [
        ("host", "cpu"),
        ("device", "gpu"),
    ]


def test_search_flags_are_separated_from_run_flags():
    request = search.parse_request(
        ["--batch-size", "8", "--autotune", "60", "--name", "mine", "--force", "--seed", "1"]
    )
    assert request == search.TuneRequest(60, "mine", True, ("--batch-size", "8", "--seed", "1"))
    assert search.parse_request(["--autotune", "--name=mine"]) == search.TuneRequest(300, "mine")
    for words in (
        ["--autotune", "soon"],
        ["--autotune", "0"],
        ["--autotune", "--name", "a b"],
        ["--autotune", "--name"],
    ):
        with pytest.raises(InputError):
            search.parse_request(words)


@pytest.fixture
def config_dir(tmp_path, monkeypatch, four_image_coco):
    """Folder for config files, with a clean environment."""
    set_only(monkeypatch, {"DATADIR": four_image_coco, "SSD_DEVICE": "cpu"})
    monkeypatch.setattr(search, "CONFIG_DIR", tmp_path)
    return tmp_path


TOY = ("--dataset", "toy", "--division", "open", "--batch-size", "2", "--num-workers", "1", "--epochs", "7")
TOY += ("--eval-epochs", "every 1", "--lr-decay-epochs", "5,6", "--flip", "horizontal+vertical")


def fake_measurements(monkeypatch, rate):
    """Replace trials by fake measurements, and record their module and flags."""
    requested = []

    def run(module, flags, settings, **_):
        requested.append((module, tuple(flags)))
        return measured(settings, rate(settings))

    monkeypatch.setattr(search, "measure_training", run)
    return requested


def test_config_file_has_the_fastest_settings_and_the_original_recipe(config_dir, monkeypatch, capsys, four_image_coco):
    requested = fake_measurements(monkeypatch, lambda settings: 3.0 if settings["num_workers"] == "0" else 1.0)
    assert commands.ssd("tune", "--autotune", "100", "--name", "mine", *TOY) == 0
    assert {module for module, _ in requested} == {"ssd"}
    variables = exported("mine", config_dir)
    config = load([], variables).config
    assert (config.num_workers, config.batch_size, config.precision) == (0, 2, "bf16")
    assert (config.epochs, config.eval_epochs, config.lr_decay_epochs, config.flip) == (
        7,
        tuple(range(1, 8)),
        (5, 6),
        "horizontal+vertical",
    )
    assert (config.dataset, config.division, variables["DATADIR"]) == ("toy", "open", str(four_image_coco))
    assert (variables["DGXNNODES"], variables["DGXNGPU"]) == ("1", "1")
    output = capsys.readouterr().out
    assert "3.00 times" in output
    text = (config_dir / "config_mine.sh").read_text()
    for part in ("3.0 img/s", "expected: at most 7 epochs", "MLPerf 1.1.0 open allows it"):
        assert part in text


def test_config_file_passes_shellcheck_and_dry_run_and_keeps_user_folders(config_dir, monkeypatch, capsys):
    fake_measurements(monkeypatch, lambda _: 1.0)
    flags = ("--autotune", "100", "--name", "mine", "--pretrained-backbone", "data/resnet34-333f7ec4.pth", *TOY)
    assert commands.ssd("tune", *flags) == 0
    path = config_dir / "config_mine.sh"
    tools = Path(sys.executable).parent  # not on PATH
    for command in ([tools / "shellcheck", "--shell=bash", path], [tools / "shfmt", "-i", "2", "-ci", "-d", path]):
        assert subprocess.run(command, capture_output=True, text=True).stdout == ""
    variables = exported("mine", config_dir, DATADIR="/x", DGXNGPU="3", PRETRAINED_DIR="/y")
    assert variables["SSD_PRETRAINED_BACKBONE"] == "/y/resnet34-333f7ec4.pth"
    assert (variables["DATADIR"], variables["DGXNGPU"]) == ("/x", "3")
    set_only(monkeypatch, exported("mine", config_dir))
    assert commands.ssd("preflight", "--dry-run") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "forbids" not in out


def test_larger_coco_batch_uses_its_published_recipe(config_dir, monkeypatch, capsys):
    monkeypatch.setattr(search, "count_train_images", lambda *_: 117_266)
    monkeypatch.setenv("DATADIR", "data/coco")
    fake_measurements(monkeypatch, lambda settings: min(1024, float(settings["batch_size"])))
    start = (
        "--batch-size",
        "64",
        "--eval-epochs",
        "every 5",
        "--ruleset",
        "1.1.0",
        "--pretrained-backbone",
        "data/resnet34.pth",
    )
    assert commands.ssd("tune", "--autotune", "100", "--name", "mine", *start) == 0
    config = load([], exported("mine", config_dir)).config
    assert config.batch_size == 1024
    assert (config.lr_decay_epochs, config.max_samples, config.warmup_steps) == ((40, 50), 50, 300)
    assert run_checks.check_rules(config, rule_values(config, 1), 1)[1] == []
    text = (config_dir / "config_mine.sh").read_text()
    assert "the reference point of 1024; MLPerf 1.1.0 closed allows it" in text
    assert f"expected: 50 epochs, {50 * 117266 / 1024 / 60:.1f} minutes" in text


def test_larger_open_images_batch_uses_its_published_recipe(config_dir, monkeypatch):
    monkeypatch.setattr(search, "count_train_images", lambda *_: 1_170_301)
    monkeypatch.setenv("DATADIR", "data/openimages")
    fake_measurements(monkeypatch, lambda settings: min(2048, float(settings["batch_size"])))
    start = ("--batch-size", "256", "--pretrained-backbone", "data/resnext50_32x4d.pth")
    assert commands.retinanet("tune", "--autotune", "100", "--name", "mine", *start) == 0
    config = retinanet_config.load([], exported("mine_retinanet", config_dir)).config
    assert (config.batch_size, config.base_lr, config.warmup_epochs) == (2048, 1.35e-4, 1)
    assert config.eval_epochs == tuple(range(1, config.epochs + 1))
    assert config.epochs > 8
    assert run_checks.check_rules(config, retinanet_commands.rule_values(config, 1), 1)[1] == []
    assert (
        "the reference point of 2048; MLPerf 5.1.0 closed allows it"
        in (config_dir / "config_mine_retinanet.sh").read_text()
    )


def test_only_force_overwrites_a_config_file(config_dir, monkeypatch, capsys):
    requested = fake_measurements(monkeypatch, lambda _: 1.0)
    (config_dir / "config_mine.sh").write_text("mine")
    assert commands.ssd("tune", "--autotune", "--name", "mine", *TOY) == 2
    assert "config_mine.sh: already exists" in capsys.readouterr().err
    assert (requested, (config_dir / "config_mine.sh").read_text()) == ([], "mine")
    assert commands.ssd("tune", "--autotune", "--name", "mine", "--force", *TOY) == 0
    assert (config_dir / "config_mine.sh").read_text() != "mine"


def test_config_file_is_named_after_hardware_and_benchmark():
    request, layout = search.TuneRequest(), LaunchLayout(num_nodes=2, ranks_per_node=8)
    config = Config()
    assert search.output_path(request, config, "NVIDIA A100-SXM4-80GB", layout).name == "config_A100-SXM4-80GB_2x8.sh"
    assert search.output_path(request, config, "CPU, 4 cores", LaunchLayout()).name == "config_CPU4-cores_1x1.sh"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "00:15:00"), (901, "00:30:00"), (7200, "02:00:00"), (86400 * 3 + 3600, "3-01:00:00")]
)
def test_slurm_time_format(seconds, text):
    assert config_file.slurm_time(seconds) == text


@pytest.mark.parametrize("folder", ["data/coco", "/my data/coco", 'a"b`c$d\\e}f'])
def test_shell_quoting_preserves_any_folder_name(folder):
    script = f"echo {config_file.env_default('NOT_SET_HERE', folder)}"
    result = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
    assert result.stdout == folder + "\n"


def measure_module(tmp_path, monkeypatch, text, limit_s=60.0):
    """Time a generated module."""
    (tmp_path / "generated_module.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    return trial.measure_training("generated_module", [], BASE, ranks=1, steps=1, warmup=0, limit_s=limit_s)


@pytest.mark.parametrize(
    ("exit_status", "error", "status"),
    [
        (1, "RuntimeError: device: out of memory. Tried to allocate", "out of memory"),
        (137, "error: rank 0 was killed by SIGKILL", "out of memory"),
        (2, "error: --optimizer-backend apex: it is not installed", "failed"),
    ],
)
def test_failed_trial_has_its_status_and_reason(tmp_path, monkeypatch, exit_status, error, status):
    launcher = tmp_path / "python"
    launcher.write_text(f"#!/bin/sh\necho 'progress\n{error}\nerror: rank 0 exited' >&2\nexit {exit_status}\n")
    launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(launcher))
    result = trial.measure_training("ssd", [], BASE, ranks=1, steps=1, warmup=0, limit_s=60)
    assert result.status == status
    assert result.reason == error or exit_status == 137


@pytest.mark.slow
def test_trial_over_the_limit_is_terminated_with_all_processes(tmp_path, monkeypatch):
    pid_file = tmp_path / "pid"
    text = f"import os, pathlib, time; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(100)"
    start_s = time.monotonic()
    result = measure_module(tmp_path, monkeypatch, text, limit_s=15)
    assert result.status == "out of time"
    assert time.monotonic() - start_s < 60
    assert not Path("/proc", pid_file.read_text()).exists()


def test_real_trial_has_the_metrics_of_bench_train(four_image_coco, monkeypatch):
    flags = ("--backbone", "resnet18", "--dataset", "toy", "--data-dir", str(four_image_coco), "--num-classes", "4")
    settings = {**BASE, "batch_size": "2", "num_workers": "0", "precision": "fp32"}
    result = trial.measure_training(
        "ssd", [*flags, "--device", "cpu"], settings, ranks=1, steps=1, warmup=0, limit_s=600
    )
    assert result.status == "measured", result.reason
    assert result.images_per_s == pytest.approx(2000 / result.step_ms)
    assert 0 <= result.data_fraction < 1
    assert (result.precision, result.settings) == ("fp32", settings)


@pytest.mark.slow
def test_tuning_on_a_cpu_finishes_in_time_and_is_not_slower(config_dir, four_image_coco):
    shutil.copy(ROOT / "config_toy.sh", config_dir)
    start_s = time.monotonic()
    assert commands.ssd("tune", "--autotune", "120", "--name", "mine", *TOY, "--backbone", "resnet18") == 0
    assert time.monotonic() - start_s < 150
    ratio = re.search(r"([\d.]+) times", (config_dir / "config_mine.sh").read_text())
    assert float(ratio[1]) >= 1
