"""The checks of a machine, each verdict of each, and the table that real ranks make."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from detection.config.settings import InputError, System
from detection.data import coco, coco2017
from detection.data.coco2017 import Published
from detection.preflight import machine_checks, resources
from detection.preflight.check_result import Finding, table
from detection.preflight.machine_checks import Trial
from detection.preflight.resources import MIB
from detection.runtime.device import Driver
from detection.runtime.distributed import Ranks
from paths import ROOT
from ssd.config import load
from ssd.inspection import benchmark, main
from ssd.preflight import CHECKS

CPU = torch.device("cpu")
CARD = torch.device("xpu", 0)  # of any kind: nothing is computed


def settings(folder, *flags):
    return load(["--dataset", "toy", "--data-dir", str(folder), "--batch-size", "4", *flags], {}).config


@pytest.mark.parametrize(
    ("there", "verdict"), [(200 * MIB, "pass"), (199 * MIB, "warn"), (100 * MIB, "warn"), (99 * MIB, "fail")]
)
def test_room_is_enough_at_twice_what_is_needed_and_fails_below_it(there, verdict):
    needed = 100 * MIB
    found = [
        resources.check_disk(Path("runs"), there, needed),
        resources.check_shared_memory(there, needed, 4),
        resources.check_memory(there, needed),
    ]
    assert [finding.verdict for finding in found] == [verdict] * 3
    assert [bool(finding.what_to_do) for finding in found] == [verdict != "pass"] * 3
    assert all("100 MiB" in finding.what for finding in found)


def test_shared_memory_that_is_not_there_limits_nothing():
    assert resources.check_shared_memory(None, 10, 4).verdict == "pass"


@pytest.mark.parametrize(("limit", "verdict"), [(704, "pass"), (703, "warn"), (351, "fail"), (-1, "pass")])
def test_the_limit_of_open_files_is_held_against_what_workers_hold(limit, verdict):
    found = resources.check_open_files(limit, num_workers=4, files_of_a_batch=8)  # 256 + 4·3·8 = 352
    assert found.verdict == verdict
    assert ("ulimit -n 4096" in found.what_to_do) == (verdict != "pass")


@pytest.mark.parametrize(
    ("driver", "verdict"),
    [
        (Driver("CUDA", (12, 4), (12, 4)), "pass"),
        (Driver("CUDA", (12, 4), (13, 0)), "pass"),
        (Driver("CUDA", (12, 4), (12, 2)), "warn"),
        (Driver("CUDA", (12, 4), (11, 8)), "fail"),
        (Driver("ROCm", (6, 0), (5, 7)), "fail"),
        (Driver("", None, None), "pass"),
    ],
)
def test_a_driver_of_an_older_major_version_fails_and_of_a_minor_one_warns(driver, verdict):
    found = machine_checks.check_driver(driver, CARD)
    assert found.verdict == verdict
    assert bool(found.what_to_do) == (verdict != "pass")
    assert machine_checks.check_driver(driver, CPU).verdict == "pass"


@pytest.mark.parametrize(("skew_s", "verdict"), [(0.0, "pass"), (-0.9, "pass"), (1.5, "warn"), (-70.0, "fail")])
def test_clocks_that_are_apart_are_told_by_how_much(skew_s, verdict):
    found = machine_checks.judge_clock(skew_s)
    assert found.verdict == verdict
    assert skew_s == 0 or f"{abs(skew_s):.2f} s" in found.what


@pytest.mark.parametrize(
    ("total_gib", "kept_gib", "verdict"),
    [(10.0, 0.0, "pass"), (4.0, 0.0, "warn"), (10.0, 5.0, "pass"), (10.0, 6.0, "warn")],
)
def test_a_step_that_fills_the_device_is_warned_of(total_gib, kept_gib, verdict):
    found = machine_checks.check_device_memory(Trial(1.0, peak_gib=3.8, gradient_bytes=1), CARD, kept_gib, total_gib)
    assert found.verdict == verdict
    assert ("--image-cache-gib" in found.what_to_do) == (kept_gib == 6)


@pytest.mark.parametrize(
    ("spent_s", "right", "verdict"), [(0.1, True, "pass"), (0.6, True, "warn"), (0.1, False, "fail")]
)
def test_a_gradient_that_travels_longer_than_half_a_step_is_warned_of(spent_s, right, verdict):
    trial = Trial(step_s=1.0, peak_gib=1.0, gradient_bytes=machine_checks.ALL_REDUCE_BYTES)
    found = machine_checks.check_bandwidth((spent_s, right), trial, world_size=2)
    assert found.verdict == verdict
    assert bool(found.what_to_do) == (verdict != "pass")
    assert machine_checks.check_bandwidth((0.0, True), trial, world_size=1).verdict == "pass"


def test_an_accelerator_that_is_not_there_is_a_failed_check_and_the_others_go_on():
    found, on = machine_checks.choose("npu", 0)
    assert (found.verdict, on) == ("fail", CPU)


def test_a_card_that_torch_does_not_see_is_warned_of(monkeypatch):
    monkeypatch.setattr(machine_checks.device, "accelerator", lambda: None)
    verdicts = []
    for there in (True, False):
        monkeypatch.setattr(machine_checks.device, "has_card", lambda there=there: there)
        verdicts.append(machine_checks.choose("auto", 0)[0].verdict)
    assert verdicts == ["warn", "pass"]
    assert machine_checks.choose("cpu", 0)[0].verdict == "pass"


def test_a_step_is_tried_and_its_gradient_is_that_of_the_network(handful):
    config = settings(
        handful, "--num-classes", "4", "--batch-size", "2", "--backbone", "resnet18", "--precision", "fp32"
    )
    alone = Ranks(0, 1, CPU)
    made = benchmark(config, alone)
    trial, found = machine_checks.check_step(made, config, alone)
    assert [finding.verdict for finding in found] == ["pass", "pass"]
    assert trial.gradient_bytes == sum(4 * weight.numel() for weight in made.model.parameters())
    assert trial.step_s > 0


@pytest.mark.parametrize(
    ("error", "what", "todo"),
    [
        (RuntimeError("device: out of memory. Tried to allocate 20 GiB\nmore"), "do not fit", "smaller --batch-size"),
        (MemoryError(), "do not fit", "smaller --batch-size"),
        (RuntimeError("no kernel image is available"), "no kernel image", "--mode bench-train"),
        (InputError("--optimizer-backend apex: it is not installed"), "apex", "Change"),
    ],
)
def test_a_step_that_cannot_be_made_fails_with_its_reason(handful, monkeypatch, error, what, todo):
    def fail(*_):
        raise error

    monkeypatch.setattr(machine_checks, "try_step", fail)
    trial, (found,) = machine_checks.check_step(None, settings(handful), Ranks(0, 1, CPU))
    assert (trial, found.verdict) == (None, "fail")
    assert what in found.what
    assert todo in found.what_to_do


@pytest.fixture
def data(handful, tmp_path):
    """A copy of the drawn data set, to be damaged."""
    shutil.copytree(handful, tmp_path / "data")
    return tmp_path / "data"


def verdicts(folder, *flags):
    found = machine_checks.check_data(settings(folder, *flags), System(), segmentations=False)
    return {(finding.name, finding.verdict) for finding in found}, " ".join(finding.what for finding in found)


def test_whole_data_pass(data):
    found, what = verdicts(data)
    assert found == {("data", "pass"), ("sample", "pass"), ("backbone", "pass")}
    assert "train: 4 images" in what


def test_missing_images_fail_with_the_first_of_them(data):
    gone = sorted((data / "train2017").iterdir())[0]
    gone.unlink()
    found, what = verdicts(data)
    assert ("data", "fail") in found
    assert gone.name in what


def test_an_image_that_cannot_be_decoded_or_is_another_fails(data):
    last = sorted((data / "val2017").iterdir())[-1]
    content = last.read_bytes()
    last.write_bytes(content[:50])
    assert ("sample", "fail") in verdicts(data)[0]
    last.write_bytes(content)
    file = data / "annotations/instances_val2017.json"
    annotations = json.loads(file.read_text())
    annotations["images"][-1]["height"] += 1
    file.write_text(json.dumps(annotations))
    found, what = verdicts(data)
    assert ("sample", "fail") in found
    assert last.name in what


def test_a_backbone_is_checked_and_its_absence_fails(data, tmp_path):
    flags = ("--pretrained-backbone", str(tmp_path / "resnet34-333f7ec4.pth"))
    found, what = verdicts(data, *flags)
    assert ("backbone", "fail") in found
    assert "./get_resnet34_backbone.sh" in what
    content = b"\x80\x02 weights"
    name = tmp_path / f"resnet34-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    name.write_bytes(content)
    assert ("backbone", "pass") in verdicts(data, "--pretrained-backbone", str(name))[0]


def test_coco_is_held_against_its_counts_and_the_sum_of_its_annotations(data):
    split = coco.read(*coco.layout(data, "train"))
    file = data / "annotations/instances_train2017.json"
    whole = Published(4, len(split.labels) + split.dropped_boxes, coco2017.sha256(file))

    def check(published, file=file):
        return [finding.verdict for finding in machine_checks.check_published("train", split, file, published)]

    assert check(whole) == ["pass", "pass"]
    assert check(Published(5, whole.annotations, whole.sha256)) == ["fail", "pass"]
    assert check(Published(4, whole.annotations + 1, whole.sha256)) == ["fail", "pass"]
    assert check(Published(4, whole.annotations, "0" * 64)) == ["pass", "fail"]
    assert check(whole, file.with_name("absent.json")) == ["pass", "warn"]


def test_data_that_are_called_coco_2017_are_checked_to_be(data):
    found, what = verdicts(data, "--dataset", "coco2017", "--num-classes", "4")
    assert {("COCO 2017", "fail"), ("checksum", "fail")} <= found
    assert "118287" in what


def test_pictures_that_are_not_drawn_yet_and_noise_are_no_mistake(tmp_path):
    assert verdicts(tmp_path / "new")[0] == {("data", "pass"), ("backbone", "pass")}
    flags = ("--mode", "bench-train", "--benchmark-input", "synthetic", "--dataset", "coco2017")
    assert verdicts(tmp_path / "new", *flags)[0] == {("data", "pass"), ("backbone", "pass")}


def test_the_table_tells_ranks_apart_only_where_they_differ():
    def of(rank):
        later = Finding("memory", "fail", "none free", "Make room.") if rank == 1 else Finding("memory", "pass", "free")
        only = [Finding("disk", "warn", "little", "Clean up.")] if rank == 0 else []
        return [Finding("device", "pass", "a card"), *only, later]

    lines = table([of(0), of(1), of(2)]).splitlines()
    assert lines == [
        "pass  device  a card",
        "warn  disk    little",
        "              Clean up.",
        "pass  memory  rank 0, 2: free",
        "fail  memory  rank 1: none free",
        "              Make room.",
        "not ready: 2 pass, 1 warn, 1 fail",
    ]


def test_on_a_terminal_lines_are_broken_below_where_they_begin_and_names_of_files_are_not():
    name = "/data/coco/annotations/" + "very_" * 12 + "long.json"
    found = Finding("data", "fail", f"{name} names 118287 images, 17 of them are not there", "Run ./init_datasets.sh.")
    lines = machine_checks.table([[found]], columns=60).splitlines()[:-1]
    assert [line for line in lines if len(line) > 60] == [f"fail  data  {name}"]
    assert lines[1:] == [f"{'':12}names 118287 images, 17 of them are not there", f"{'':12}Run ./init_datasets.sh."]


@pytest.mark.parametrize(
    ("flags", "verdicts", "text"),
    [
        (("--division", "open"), ["pass"], "MLPerf 1.1.0 open lets it start"),
        (("--division", "open", "--ruleset", "0.7.0", "--target", ".1"), ["warn"], "0.7.0 open forbids target: 0.1"),
        (("--division", "closed", "--dataset", "coco2017", "--eval-epochs", "every 5", "--pretrained-backbone", "a.pth"),
         ["pass"], "MLPerf 1.1.0 closed lets it start"),
        (("--division", "closed", "--momentum", ".8"), ["fail"] * 4, "closed forbids momentum: 0.8"),
        (("--mode", "bench-train"), ["pass"], "is no MLPerf run"),
    ],
)  # fmt: skip
def test_the_rules_are_checked_with_the_machine(tmp_path, flags, verdicts, text):
    config = settings(tmp_path, *flags)
    found = machine_checks.check_rules(config, CHECKS.recipe(config, 1), world_size=1)
    assert [finding.verdict for finding in found] == verdicts
    assert any(text in finding.what for finding in found)
    assert all(finding.what_to_do.startswith("Change it, or") for finding in found if finding.verdict == "fail")


def flags_of(folder):
    recipe = ("--dataset", "toy", "--data-dir", str(folder), "--backbone", "resnet18", "--batch-size", "2")
    return (*recipe, "--division", "open", "--device", "cpu")


def test_two_ranks_inspect_together_and_print_one_table(handful):
    launch = ("-m", "detection.runtime.launch", "--nproc-per-node", "2", "-m", "ssd.inspection")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SSD_", "DGX"))}
    done = subprocess.run(
        [sys.executable, *launch, *flags_of(handful)],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("GiB/s over 2 ranks") == 1
    assert done.stdout.splitlines()[-1].startswith("ready: ")
    for name in (
        "device",
        "versions",
        "rules",
        "driver",
        "clock",
        "training step",
        "data",
        "sample",
        "disk",
        "open files",
    ):
        assert f"pass  {name} " in done.stdout


def test_one_failed_check_ends_with_2_after_the_whole_table(data, monkeypatch, capsys):
    monkeypatch.setattr(machine_checks, "try_step", lambda *_: Trial(1.0, 1.0, 1))
    sorted((data / "train2017").iterdir())[0].unlink()
    assert main([*flags_of(data)]) == 2
    shown = capsys.readouterr()
    assert "fail  data" in shown.out
    assert "pass  training step" in shown.out
    assert shown.out.splitlines()[-1].startswith("not ready: ")
    assert shown.err == ""


def test_a_mistake_of_settings_is_one_message(handful, capsys):
    assert main([*flags_of(handful), "--epochs", "0"]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("error:")) == ("", 1)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [({}, "pass"), ({"data_dir": "/elsewhere"}, "pass"), ({"torch": "2.4.0"}, "fail"), ({"batch_size": 8}, "fail")],
)
def test_a_rank_with_other_versions_or_settings_fails_and_says_which(handful, monkeypatch, changes, verdict):
    monkeypatch.setattr(Ranks, "broadcast", lambda _, mine: mine | changes)
    found = machine_checks.check_alike(settings(handful), Ranks(1, 2, CPU))
    assert found.verdict == verdict
    if verdict == "fail":
        ((name, value),) = changes.items()
        assert f"{name} " in found.what
        assert f"for {value}" in found.what


@pytest.mark.slow
def test_two_nodes_inspect_together(handful):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    launch = [sys.executable, "-m", "detection.runtime.launch", "--nnodes", "2", "--nproc-per-node", "1"]
    launch += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    nodes = [
        subprocess.Popen(
            [*launch, "--node-rank", str(node), "-m", "ssd.inspection", *flags_of(handful)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in (0, 1)
    ]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "over 2 ranks" in said[0]
    assert said[1] == ""


def test_means_that_come_out_wrong_are_seen(monkeypatch):
    ranks = Ranks(0, 2, CPU)
    monkeypatch.setattr(machine_checks, "ALL_REDUCE_BYTES", 64)
    monkeypatch.setattr(Ranks, "barrier", lambda _: None)
    for wrong in (0.0, 1.0):
        monkeypatch.setattr(Ranks, "mean", lambda _, tensor, wrong=wrong: tensor.fill_(0.5 + wrong))
        assert machine_checks.measure_all_reduce(ranks)[1] == (wrong == 0)
    assert np.isfinite(machine_checks.measure_all_reduce(ranks)[0])
