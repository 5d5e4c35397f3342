"""Machine checks: every status of each check, and the table of real ranks."""

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

from config_files import set_only
from detection.config.settings import InputError, LaunchLayout
from detection.data import coco, coco2017
from detection.data.coco2017 import PublishedSplit
from detection.preflight import machine_checks, resources
from detection.preflight.check_result import CheckResult, format_table
from detection.preflight.machine_checks import StepProbe
from detection.preflight.resources import MIB
from detection.runtime.device import DriverVersion
from detection.runtime.distributed import DistContext
from paths import ROOT
from ssd.commands import PREFLIGHT, make_random_workload
from ssd.config import load
from torchrun import run_ranks

CPU = torch.device("cpu")
ACCELERATOR = torch.device("xpu", 0)  # any kind: nothing is computed


def settings(folder, *flags):
    return load(["--dataset", "toy", "--data-dir", str(folder), "--batch-size", "4", *flags], {}).config


@pytest.mark.parametrize(
    ("available", "status"), [(200 * MIB, "pass"), (199 * MIB, "warn"), (100 * MIB, "warn"), (99 * MIB, "fail")]
)
def test_resource_passes_at_twice_the_need_and_fails_below_it(available, status):
    needed = 100 * MIB
    results = [
        resources.check_disk(Path("runs"), available, needed),
        resources.check_shared_memory(available, needed, 4),
        resources.check_memory(available, needed),
    ]
    assert [result.status for result in results] == [status] * 3
    assert [bool(result.hint) for result in results] == [status != "pass"] * 3
    assert all("100 MiB" in result.message for result in results)


def test_missing_shared_memory_passes():
    assert resources.check_shared_memory(None, 10, 4).status == "pass"


@pytest.mark.parametrize(("limit", "status"), [(704, "pass"), (703, "warn"), (351, "fail"), (-1, "pass")])
def test_open_file_limit_is_compared_with_the_workers_files(limit, status):
    result = resources.check_open_files(limit, num_workers=4, files_per_batch=8)  # 256 + 4·3·8 = 352
    assert result.status == status
    assert ("ulimit -n 4096" in result.hint) == (status != "pass")


@pytest.mark.parametrize(
    ("driver", "status"),
    [
        (DriverVersion("CUDA", (12, 4), (12, 4)), "pass"),
        (DriverVersion("CUDA", (12, 4), (13, 0)), "pass"),
        (DriverVersion("CUDA", (12, 4), (12, 2)), "warn"),
        (DriverVersion("CUDA", (12, 4), (11, 8)), "fail"),
        (DriverVersion("ROCm", (6, 0), (5, 7)), "fail"),
        (DriverVersion("", None, None), "pass"),
    ],
)
def test_older_major_driver_version_fails_and_minor_one_warns(driver, status):
    result = machine_checks.check_driver(driver, ACCELERATOR)
    assert result.status == status
    assert bool(result.hint) == (status != "pass")
    assert machine_checks.check_driver(driver, CPU).status == "pass"


@pytest.mark.parametrize(("skew_s", "status"), [(0.0, "pass"), (-0.9, "pass"), (1.5, "warn"), (-70.0, "fail")])
def test_clock_skew_is_reported(skew_s, status):
    result = machine_checks.check_clock_skew(skew_s)
    assert result.status == status
    assert skew_s == 0 or f"{abs(skew_s):.2f} s" in result.message


@pytest.mark.parametrize(
    ("total_gib", "cache_gib", "status"),
    [(10.0, 0.0, "pass"), (4.0, 0.0, "warn"), (10.0, 5.0, "pass"), (10.0, 6.0, "warn")],
)
def test_step_that_fills_device_memory_warns(total_gib, cache_gib, status):
    result = machine_checks.check_device_memory(
        StepProbe(1.0, peak_gib=3.8, gradient_bytes=1), ACCELERATOR, cache_gib, total_gib
    )
    assert result.status == status
    assert ("--image-cache-gib" in result.hint) == (cache_gib == 6)


@pytest.mark.parametrize(
    ("elapsed_s", "is_correct", "status"), [(0.1, True, "pass"), (0.6, True, "warn"), (0.1, False, "fail")]
)
def test_all_reduce_longer_than_half_a_step_warns(elapsed_s, is_correct, status):
    probe = StepProbe(step_s=1.0, peak_gib=1.0, gradient_bytes=machine_checks.ALL_REDUCE_BYTES)
    result = machine_checks.check_bandwidth((elapsed_s, is_correct), probe, world_size=2)
    assert result.status == status
    assert bool(result.hint) == (status != "pass")
    assert machine_checks.check_bandwidth((0.0, True), probe, world_size=1).status == "pass"


def test_missing_accelerator_fails_its_check_and_selects_the_cpu():
    result, torch_device = machine_checks.check_device("npu", 0)
    assert (result.status, torch_device) == ("fail", CPU)


def test_accelerator_unknown_to_torch_warns(monkeypatch):
    monkeypatch.setattr(machine_checks.device, "current_accelerator", lambda: None)
    statuses = []
    for is_loaded in (True, False):
        monkeypatch.setattr(machine_checks.device, "accelerator_driver_loaded", lambda is_loaded=is_loaded: is_loaded)
        statuses.append(machine_checks.check_device("auto", 0)[0].status)
    assert statuses == ["warn", "pass"]
    assert machine_checks.check_device("cpu", 0)[0].status == "pass"


def test_probe_step_measures_time_and_gradient_size(four_image_coco):
    config = settings(
        four_image_coco, "--num-classes", "4", "--batch-size", "2", "--backbone", "resnet18", "--precision", "fp32"
    )
    single_rank = DistContext(0, 1, CPU)
    workload = make_random_workload(config, single_rank)
    probe, results = machine_checks.check_step(workload, config, single_rank)
    assert [result.status for result in results] == ["pass", "pass"]
    assert probe.gradient_bytes == sum(4 * weight.numel() for weight in workload.model.parameters())
    assert probe.step_s > 0


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (RuntimeError("device: out of memory. Tried to allocate 20 GiB\nmore"), "do not fit", "smaller --batch-size"),
        (MemoryError(), "do not fit", "smaller --batch-size"),
        (RuntimeError("no kernel image is available"), "no kernel image", "--mode bench-train"),
        (InputError("--optimizer-backend apex: it is not installed"), "apex", "Change"),
    ],
)
def test_failing_step_reports_its_reason(four_image_coco, monkeypatch, error, message, hint):
    def fail(*_):
        raise error

    monkeypatch.setattr(machine_checks, "probe_step", fail)
    probe, (result,) = machine_checks.check_step(None, settings(four_image_coco), DistContext(0, 1, CPU))
    assert (probe, result.status) == (None, "fail")
    assert message in result.message
    assert hint in result.hint


@pytest.fixture
def data(four_image_coco, tmp_path):
    """Copy of the generated data set that a test may damage."""
    shutil.copytree(four_image_coco, tmp_path / "data")
    return tmp_path / "data"


def check_statuses(folder, *flags):
    results = machine_checks.check_data(settings(folder, *flags), LaunchLayout(), PREFLIGHT)
    return {(result.name, result.status) for result in results}, " ".join(result.message for result in results)


def test_complete_data_set_passes(data):
    statuses, text = check_statuses(data)
    assert statuses == {("data", "pass"), ("sample", "pass"), ("backbone", "pass")}
    assert "train: 4 images" in text


def test_missing_images_fail_and_name_the_first(data):
    missing = sorted((data / "train2017").iterdir())[0]
    missing.unlink()
    statuses, text = check_statuses(data)
    assert ("data", "fail") in statuses
    assert missing.name in text


def test_damaged_or_wrong_image_fails(data):
    last = sorted((data / "val2017").iterdir())[-1]
    content = last.read_bytes()
    last.write_bytes(content[:50])
    assert ("sample", "fail") in check_statuses(data)[0]
    last.write_bytes(content)
    file = data / "annotations/instances_val2017.json"
    annotations = json.loads(file.read_text())
    annotations["images"][-1]["height"] += 1
    file.write_text(json.dumps(annotations))
    statuses, text = check_statuses(data)
    assert ("sample", "fail") in statuses
    assert last.name in text


def test_decode_all_lists_every_broken_image(data):
    files = sorted((data / "train2017").iterdir())
    for file in files[1:3]:
        file.write_bytes(file.read_bytes()[:-200])

    def check_images(**options):
        results = machine_checks.check_data(settings(data), LaunchLayout(), PREFLIGHT, **options)
        return [(r.status, r.message) for r in results if r.name == "images"]

    assert check_images() == []
    failed = check_images(decode_all=True)
    assert [status for status, _ in failed] == ["fail", "fail", "pass"]
    assert all(
        f"{file}: this image cannot be read" in text for file, (_, text) in zip(files[1:3], failed, strict=False)
    )
    assert failed[2][1] == "val: all 2 images decoded"


def test_missing_backbone_fails(data, tmp_path):
    flags = ("--pretrained-backbone", str(tmp_path / "resnet34-333f7ec4.pth"))
    statuses, text = check_statuses(data, *flags)
    assert ("backbone", "fail") in statuses
    assert "./get_weights.sh resnet34" in text
    content = b"\x80\x02 weights"
    name = tmp_path / f"resnet34-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    name.write_bytes(content)
    assert ("backbone", "pass") in check_statuses(data, "--pretrained-backbone", str(name))[0]


def test_coco_counts_and_annotation_checksum_are_verified(data):
    split = coco.read(*coco.standard_paths(data, "train"))
    file = data / "annotations/instances_train2017.json"
    expected = PublishedSplit(4, len(split.labels) + split.num_dropped_boxes, coco2017.sha256(file))

    def check(published, file=file):
        return [result.status for result in machine_checks.check_published("train", split, file, published)]

    assert check(expected) == ["pass", "pass"]
    assert check(PublishedSplit(5, expected.num_annotations, expected.sha256)) == ["fail", "pass"]
    assert check(PublishedSplit(4, expected.num_annotations + 1, expected.sha256)) == ["fail", "pass"]
    assert check(PublishedSplit(4, expected.num_annotations, "0" * 64)) == ["pass", "fail"]
    assert check(expected, file.with_name("absent.json")) == ["pass", "warn"]


def test_data_set_named_coco2017_is_verified(data):
    statuses, text = check_statuses(data, "--dataset", "coco2017", "--num-classes", "4")
    assert {("COCO 2017", "fail"), ("checksum", "fail")} <= statuses
    assert "118287" in text


def test_ungenerated_images_and_synthetic_input_pass(tmp_path):
    assert check_statuses(tmp_path / "new")[0] == {("data", "pass"), ("backbone", "pass")}
    flags = ("--mode", "bench-train", "--benchmark-input", "synthetic", "--dataset", "coco2017")
    assert check_statuses(tmp_path / "new", *flags)[0] == {("data", "pass"), ("backbone", "pass")}


def test_table_names_ranks_only_if_they_differ():
    def results_of(rank):
        memory = (
            CheckResult("memory", "fail", "none free", "Make room.")
            if rank == 1
            else CheckResult("memory", "pass", "free")
        )
        disk = [CheckResult("disk", "warn", "little", "Clean up.")] if rank == 0 else []
        return [CheckResult("device", "pass", "an accelerator"), *disk, memory]

    lines = format_table([results_of(0), results_of(1), results_of(2)]).splitlines()
    assert lines == [
        "pass  device  an accelerator",
        "warn  disk    little",
        "              Clean up.",
        "pass  memory  rank 0, 2: free",
        "fail  memory  rank 1: none free",
        "              Make room.",
        "not ready: 2 pass, 1 warn, 1 fail",
    ]


def test_table_wraps_lines_but_not_paths():
    path = "/data/coco/annotations/" + "very_" * 12 + "long.json"
    result = CheckResult(
        "data", "fail", f"{path} names 118287 images, 17 of them are missing", "Run ./init_datasets.sh."
    )
    lines = machine_checks.format_table([[result]], columns=60).splitlines()[:-1]
    assert [line for line in lines if len(line) > 60] == [f"fail  data  {path}"]
    assert lines[1:] == [f"{'':12}names 118287 images, 17 of them are missing", f"{'':12}Run ./init_datasets.sh."]


@pytest.mark.parametrize(
    ("flags", "statuses", "text"),
    [
        (("--division", "open"), ["pass"], "MLPerf 1.1.0 open allows these settings"),
        (("--division", "open", "--ruleset", "0.7.0", "--target", ".1"), ["warn"], "0.7.0 open forbids target: 0.1"),
        (("--division", "closed", "--dataset", "coco2017", "--eval-epochs", "every 5", "--pretrained-backbone", "a"),
         ["pass"], "1.1.0 closed allows these settings"),
        (("--division", "closed", "--momentum", ".8"), ["fail"] * 5, "closed forbids momentum: 0.8"),
        (("--mode", "bench-train"), ["pass"], "is not an MLPerf run"),
    ],
)  # fmt: skip
def test_rules_are_checked_with_the_machine(tmp_path, flags, statuses, text):
    config = settings(tmp_path, *flags)
    results = machine_checks.check_rules(config, PREFLIGHT.rule_values(config, 1), world_size=1)
    assert [result.status for result in results] == statuses
    assert any(text in result.message for result in results)
    assert all(result.hint.startswith("Change it, or") for result in results if result.status == "fail")


def run_flags(folder):
    recipe = ("--dataset", "toy", "--data-dir", str(folder), "--backbone", "resnet18", "--batch-size", "2")
    return (*recipe, "--division", "open", "--device", "cpu")


def test_two_ranks_print_one_table(four_image_coco, monkeypatch):
    set_only(monkeypatch, {})
    done = run_ranks(2, "-m", "ssd", "inspect", *run_flags(four_image_coco))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("GiB/s over 2 ranks") == 1
    assert done.stdout.splitlines()[-1].startswith("ready: ")
    names = ("device", "versions", "rules", "driver", "clock", "training step", "data", "sample", "disk", "open files")
    assert all(f"pass  {name} " in done.stdout for name in names)


def test_failed_check_exits_with_2_after_the_whole_table(data, monkeypatch, capsys):
    monkeypatch.setattr(machine_checks, "probe_step", lambda *_: StepProbe(1.0, 1.0, 1))
    sorted((data / "train2017").iterdir())[0].unlink()
    assert machine_checks.main([*run_flags(data)], PREFLIGHT, make_random_workload) == 2
    shown = capsys.readouterr()
    assert "fail  data" in shown.out
    assert "pass  training step" in shown.out
    assert shown.out.splitlines()[-1].startswith("not ready: ")
    assert shown.err == ""


def test_invalid_setting_gives_one_message(four_image_coco, capsys):
    assert machine_checks.main([*run_flags(four_image_coco), "--epochs", "0"], PREFLIGHT, make_random_workload) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("error:")) == ("", 1)


@pytest.mark.parametrize(
    ("changes", "status"),
    [({}, "pass"), ({"data_dir": "/elsewhere"}, "pass"), ({"torch": "2.4.0"}, "fail"), ({"batch_size": 8}, "fail")],
)
def test_rank_with_different_versions_or_settings_fails(four_image_coco, monkeypatch, changes, status):
    monkeypatch.setattr(DistContext, "broadcast", lambda _, local: local | changes)
    result = machine_checks.check_consistency(settings(four_image_coco), DistContext(1, 2, CPU))
    assert result.status == status
    if status == "fail":
        ((name, value),) = changes.items()
        assert f"{name} " in result.message
        assert f"instead of {value}" in result.message


@pytest.mark.slow
def test_two_nodes_print_one_table(four_image_coco):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    launch = [sys.executable, "-m", "detection.runtime.launch", "--nnodes", "2", "--nproc-per-node", "1"]
    launch += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    nodes = [
        subprocess.Popen(
            [*launch, "--node-rank", str(node), "-m", "ssd", "inspect", *run_flags(four_image_coco)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in (0, 1)
    ]
    outputs = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "over 2 ranks" in outputs[0]
    assert outputs[1] in ("", f"waiting for node 0 at 127.0.0.1, port {port}\n")


def test_wrong_all_reduce_is_detected(monkeypatch):
    ranks = DistContext(0, 2, CPU)
    monkeypatch.setattr(machine_checks, "ALL_REDUCE_BYTES", 64)
    monkeypatch.setattr(DistContext, "barrier", lambda _: None)
    for error in (0.0, 1.0):
        monkeypatch.setattr(DistContext, "all_reduce_mean", lambda _, tensor, error=error: tensor.fill_(0.5 + error))
        assert machine_checks.measure_all_reduce(ranks)[1] == (error == 0)
    assert np.isfinite(machine_checks.measure_all_reduce(ranks)[0])
