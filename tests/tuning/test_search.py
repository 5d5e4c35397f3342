"""Tuning: what is tried and what is taken over, measured by numbers that are made up; and trials in real processes."""

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from detection.config.settings import InputError, System
from detection.preflight import run_checks
from detection.tuning import config_file, search, trial
from detection.tuning.search import Bench, Direction
from detection.tuning.trial import Trial
from paths import ROOT
from ssd import tune
from ssd.config import Config, load
from ssd.preflight import recipe

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
    return Trial(settings, "measured", spent_s=0.0, images_per_s=rate, step_ms=1e6, precision="bf16")


def bench(rates, seconds=100.0):
    """A bench on which `rates` says the rate of settings, or how they end."""
    asked = []

    def measure(settings, steps, warmup, limit_s):
        asked.append(dict(settings))
        found = rates(settings)
        return Trial(settings, found, 0.0, why="why") if isinstance(found, str) else measured(settings, found)

    made = Bench(measure, lambda one: 1 / one.images_per_s, time.monotonic() + seconds)
    return made, asked


def test_a_direction_is_followed_as_long_as_it_gains():
    made, asked = bench(lambda settings: {"2": 2.0, "4": 3.0, "8": 3.05, "16": 9.0}[settings["num_workers"]])
    best = made.follow(measured(BASE, 1.0), Direction("num_workers", ("2", "4", "8", "16")))
    assert best.settings["num_workers"] == "4"  # 8 gains less than 3 %
    assert [settings["num_workers"] for settings in asked] == ["2", "4", "8"]


@pytest.mark.parametrize("ending", ["out of memory", "failed", "out of time"])
def test_a_trial_that_cannot_be_measured_ends_its_direction_and_nothing_else(ending, capsys):
    made, asked = bench(lambda settings: ending if settings["batch_size"] == "16" else float(settings["batch_size"]))
    best = made.follow(measured(BASE, 1.0), Direction("batch_size", ("8", "16", "32")))
    assert best.settings["batch_size"] == "8"
    assert len(asked) == 2
    assert ending in capsys.readouterr().out
    assert made.follow(best, Direction("batch_size", ("64",))).settings["batch_size"] == "64"


def test_what_is_only_measured_is_not_taken_over():
    made, asked = bench(lambda _: 50.0)
    best = measured(BASE, 1.0)
    assert made.follow(best, Direction("batch_size", ("8",), chosen=False)) is best
    assert len(asked) == 1


def test_no_trial_is_begun_that_would_not_end_in_time():
    made, asked = bench(lambda _: 1.0, seconds=10)
    made.trials.append(replace(measured(BASE, 1.0), spent_s=9.5))
    assert made.try_out(BASE) is None
    made.trials[0] = replace(made.trials[0], spent_s=5)
    assert made.try_out(BASE)
    assert len(asked) == 1


def test_a_batch_that_does_not_fit_is_computed_in_more_parts():
    made, _ = bench(lambda settings: 1.0 if settings["grad_accum_steps"] == "4" else "out of memory")
    assert search.begin(made, dict(BASE)).settings["grad_accum_steps"] == "4"
    never, _ = bench(lambda _: "out of memory")
    with pytest.raises(InputError, match="smaller --batch-size"):
        search.begin(never, dict(BASE))


@pytest.mark.parametrize(("ending", "message"), [("failed", "failed: why"), ("out of time", "more seconds")])
def test_a_first_trial_that_gives_nothing_is_a_mistake_of_the_user(ending, message):
    made, _ = bench(lambda _: ending)
    with pytest.raises(InputError, match=message):
        search.begin(made, dict(BASE))


def test_short_steps_are_measured_again_in_greater_number():
    made, asked = bench(lambda _: 1.0)
    made.measure = lambda settings, steps, *_: asked.append(steps) or replace(measured(settings, 1.0), step_ms=100)
    search.begin(made, dict(BASE))
    assert asked == [search.STEPS, 49]  # a twentieth of 100 s, in steps of 0.1 s


def test_the_cache_is_measured_only_where_there_is_time_to_fill_it(capsys):
    made, asked = bench(lambda _: 2.0)
    best = replace(measured(BASE, 1.0), step_ms=1000)
    assert search.try_cache(made, best, 1000, ["host"]) is best
    assert "not measured" in capsys.readouterr().out
    assert search.try_cache(made, best, 10, ["host"]).settings["image_cache"] == "host"
    assert len(asked) == 1


def test_the_memory_is_taken_that_trains_fastest():
    rates = {"none": 1.0, "host": 2.0, "device": 3.0}
    made, asked = bench(lambda settings: rates[settings["image_cache"]])
    best = replace(measured(BASE | {"jpeg_decoder": "gpu"}, 1.0), step_ms=1)
    best = search.try_cache(made, best, 10, ["host", "device"])
    assert best.settings["image_cache"] == "device"
    assert [(one["image_cache"], one["jpeg_decoder"]) for one in asked] == [("host", "cpu"), ("device", "gpu")]


def test_the_words_of_tuning_are_taken_out_of_the_flags():
    order = search.read(["--batch-size", "8", "--autotune", "60", "--name", "mine", "--force", "--seed", "1"])
    assert order == search.Order(60, "mine", True, ("--batch-size", "8", "--seed", "1"))
    assert search.read(["--autotune", "--name=mine"]) == search.Order(300, "mine")
    for words in (
        ["--autotune", "soon"],
        ["--autotune", "0"],
        ["--autotune", "--name", "a b"],
        ["--autotune", "--name"],
    ):
        with pytest.raises(InputError):
            search.read(words)


@pytest.fixture
def here(tmp_path, monkeypatch, handful):
    """The folder that config files are written to; nothing is set in the environment."""
    for name in [name for name in os.environ if name.startswith(("SSD_", "DGX"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(search, "FOLDER", tmp_path)
    monkeypatch.setenv("DATADIR", str(handful))
    monkeypatch.setenv("SSD_DEVICE", "cpu")
    return tmp_path


TOY = ("--dataset", "toy", "--division", "open", "--batch-size", "2", "--num-workers", "1", "--epochs", "7")
TOY += ("--eval-epochs", "every 1", "--lr-decay-epochs", "5,6", "--flip", "horizontal+vertical")


def rates_of(monkeypatch, rate):
    """Trials whose rates are made up."""
    asked = []

    def run(module, flags, settings, **_):
        asked.append((module, tuple(flags)))
        return measured(settings, rate(settings))

    monkeypatch.setattr(trial, "run", run)
    return asked


def resolved(path):
    """What the settings are once a written file is sourced."""
    shell = subprocess.run(
        ["bash", "-euc", f"source {path}; exec env -0"],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        check=True,
    )
    given = dict(line.split("=", 1) for line in shell.stdout.decode().strip("\0").split("\0"))
    return given, load([], {name: value for name, value in given.items() if name != "PATH"}).config


def test_the_file_has_the_fastest_settings_and_the_recipe_that_was_there(here, monkeypatch, capsys, handful):
    asked = rates_of(monkeypatch, lambda settings: 3.0 if settings["num_workers"] == "0" else 1.0)
    assert tune.main(["--autotune", "100", "--name", "mine", *TOY]) == 0
    assert {module for module, _ in asked} == {"ssd.train"}
    given, config = resolved(here / "config_mine.sh")
    assert (config.num_workers, config.batch_size, config.precision) == (0, 2, "bf16")
    assert (config.epochs, config.eval_epochs, config.lr_decay_epochs, config.flip) == (
        7,
        tuple(range(1, 8)),
        (5, 6),
        "both",
    )
    assert (config.dataset, config.division, given["DATADIR"]) == ("toy", "open", str(handful))
    assert (given["DGXNNODES"], given["DGXNGPU"]) == ("1", "1")
    shown = capsys.readouterr().out
    assert "3.00 times" in shown
    text = (here / "config_mine.sh").read_text()
    for part in ("3.0 img/s", "expected: 7 epochs at most", "MLPerf 1.1.0 open allows it"):
        assert part in text


def test_a_written_file_passes_shellcheck_and_the_dry_run_and_leaves_folders_to_the_user(here, monkeypatch):
    rates_of(monkeypatch, lambda _: 1.0)
    monkeypatch.setenv("DATADIR", os.environ["DATADIR"])
    assert (
        tune.main(["--autotune", "100", "--name", "mine", "--pretrained-backbone", "data/resnet34-333f7ec4.pth", *TOY])
        == 0
    )
    path = here / "config_mine.sh"
    for command in (["shellcheck", "--shell=bash", str(path)], ["shfmt", "-i", "2", "-ci", "-d", str(path)]):
        assert subprocess.run(command, capture_output=True, text=True).stdout == ""
    script = f'source {path}; exec "$0" -m ssd.preflight --dry-run'
    done = subprocess.run(
        ["bash", "-euc", script, sys.executable],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "DGXSYSTEM": "mine"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "forbids" not in done.stdout
    environ = {"PATH": os.environ["PATH"], "DATADIR": "/x", "DGXNGPU": "3", "PRETRAINED_DIR": "/y"}
    shown = subprocess.run(
        ["bash", "-euc", f"source {path}; echo $DATADIR $DGXNGPU $SSD_PRETRAINED_BACKBONE"],
        env=environ,
        capture_output=True,
        text=True,
    )
    assert shown.stdout == "/x 3 /y/resnet34-333f7ec4.pth\n"


def test_a_larger_batch_of_coco_takes_the_recipe_that_was_published_for_it(here, monkeypatch, capsys):
    monkeypatch.setattr(search, "count_images", lambda *_: 117_266)
    monkeypatch.setenv("DATADIR", "data/coco")
    rates_of(monkeypatch, lambda settings: min(1024, float(settings["batch_size"])))
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
    assert tune.main(["--autotune", "100", "--name", "mine", *start]) == 0
    _, config = resolved(here / "config_mine.sh")
    assert config.batch_size == 1024
    assert (config.lr_decay_epochs, config.max_samples, config.warmup_steps) == ((40, 50), 50, 300)
    assert run_checks.judge(config, recipe(config, 1), 1)[1] == []
    text = (here / "config_mine.sh").read_text()
    assert "the reference point of 1024; MLPerf 1.1.0 closed allows it" in text
    assert f"expected: 50 epochs, {50 * 117266 / 1024 / 60:.1f} minutes" in text


def test_a_file_that_is_there_is_written_over_by_force_alone(here, monkeypatch, capsys):
    asked = rates_of(monkeypatch, lambda _: 1.0)
    (here / "config_mine.sh").write_text("mine")
    assert tune.main(["--autotune", "--name", "mine", *TOY]) == 2
    assert "config_mine.sh is there already" in capsys.readouterr().err
    assert (asked, (here / "config_mine.sh").read_text()) == ([], "mine")
    assert tune.main(["--autotune", "--name", "mine", "--force", *TOY]) == 0
    assert (here / "config_mine.sh").read_text() != "mine"


def test_a_file_is_named_after_the_hardware_and_the_benchmark():
    order, system = search.Order(), System(nodes=2, ranks_per_node=8)
    config = Config()
    assert search.target(order, config, "NVIDIA A100-SXM4-80GB", system).name == "config_A100-SXM4-80GB_2x8.sh"
    assert search.target(order, config, "CPU, 4 cores", System()).name == "config_CPU4-cores_1x1.sh"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:15:00"), (901, "00:30:00"), (7200, "02:00:00"), (86400 * 3 + 3600, "3-01:00:00")],
)
def test_a_time_is_written_as_slurm_reads_it(seconds, text):
    assert config_file.clock(seconds) == text


@pytest.mark.parametrize("folder", ["data/coco", "/my data/coco", 'a"b`c$d\\e}f'])
def test_a_folder_of_any_name_is_kept_by_the_shell(folder):
    script = f"echo {config_file.preset('NOT_SET_HERE', folder)}"
    shown = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
    assert shown.stdout == folder + "\n"


def started(tmp_path, monkeypatch, text, limit_s=60.0):
    """A trial of a module that is made up."""
    (tmp_path / "made_up_module.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    return trial.run("made_up_module", [], BASE, ranks=1, steps=1, warmup=0, limit_s=limit_s)


def test_a_trial_that_is_out_of_memory_says_so(tmp_path, monkeypatch):
    found = started(tmp_path, monkeypatch, "raise RuntimeError('device: out of memory. Tried to allocate')")
    assert found.ending == "out of memory"


def test_a_trial_that_fails_says_why(tmp_path, monkeypatch):
    found = started(
        tmp_path, monkeypatch, "import sys; sys.exit('error: --optimizer-backend apex: it is not installed')"
    )
    assert (found.ending, found.why) == ("failed", "error: --optimizer-backend apex: it is not installed")


@pytest.mark.slow
def test_a_trial_that_takes_too_long_is_ended_with_all_its_processes(tmp_path, monkeypatch):
    mark = tmp_path / "pid"
    text = f"import os, pathlib, time; pathlib.Path({str(mark)!r}).write_text(str(os.getpid())); time.sleep(100)"
    start_s = time.monotonic()
    found = started(tmp_path, monkeypatch, text, limit_s=15)
    assert found.ending == "out of time"
    assert time.monotonic() - start_s < 60
    assert not Path("/proc", mark.read_text()).exists()


def test_a_real_trial_has_the_figures_of_the_benchmark_mode(handful, monkeypatch):
    flags = ("--backbone", "resnet18", "--dataset", "toy", "--data-dir", str(handful), "--num-classes", "4")
    settings = {**BASE, "batch_size": "2", "num_workers": "0", "precision": "fp32"}
    found = trial.run("ssd.train", [*flags, "--device", "cpu"], settings, ranks=1, steps=1, warmup=0, limit_s=120)
    assert found.ending == "measured", found.why
    assert found.images_per_s == pytest.approx(2000 / found.step_ms)
    assert 0 <= found.data_share < 1
    assert (found.precision, found.settings) == ("fp32", settings)


@pytest.mark.slow
def test_tuning_on_a_cpu_ends_in_time_with_a_file_at_least_as_fast(here, handful):
    shutil.copy(ROOT / "config_toy.sh", here)
    start_s = time.monotonic()
    assert tune.main(["--autotune", "120", "--name", "mine", *TOY, "--backbone", "resnet18"]) == 0
    assert time.monotonic() - start_s < 150
    ratio = re.search(r"([\d.]+) times", (here / "config_mine.sh").read_text())
    assert float(ratio[1]) >= 1
