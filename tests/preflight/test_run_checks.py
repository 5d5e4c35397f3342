import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import commands
from config_files import exported, set_only
from detection.checkpoint import checkpointer
from detection.config.settings import to_json
from detection.data import coco_arrays, worker_shm
from detection.engine import optim
from detection.git_state import GitState
from detection.preflight import run_checks
from detection.synthetic import toy
from maskrcnn import commands as maskrcnn_commands
from mlperf.rules import BENCHMARKS
from paths import ROOT
from ssd.config import load
from ssd.model import SSD300

SYSTEMS = sorted(path.stem.removeprefix("config_") for path in ROOT.glob("config_*.sh"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    toy.generate(folder, toy.ToySpec(train_images=24, val_images=4, seed=0))
    return folder


@pytest.fixture
def check(monkeypatch, tmp_path, data_dir, capsys):
    """Run preflight on generated images. Returns status, stdout and stderr."""
    set_only(monkeypatch, {"LOGDIR": tmp_path / "results", "DATADIR": data_dir})

    def run(*argv, **environ):
        for name, value in environ.items():
            monkeypatch.setenv(name, str(value))
        recipe = ["--dataset", "toy", "--division", "open", "--batch-size", "4"]
        status = commands.ssd("preflight", *recipe, *argv)
        return status, *capsys.readouterr()

    return run


def test_valid_run_prints_organization_folder_and_counts(check, tmp_path):
    status, out, err = check("--org", "Some Lab")
    org, folder, mode, num_classes = out.splitlines()
    assert (status, org, mode, num_classes) == (0, "Some Lab", "train", "4")
    assert Path(folder).is_dir()
    assert Path(folder).parent == tmp_path / "results/toy/ssd"
    assert "train: 24 images" in err
    assert "val: 4 images" in err


def test_arrays_that_are_not_used_are_a_warning(check, data_dir):
    annotation_file = data_dir / "annotations" / "instances_train2017.json"
    arrays_file = coco_arrays.arrays_path(annotation_file)
    try:
        coco_arrays.main([str(annotation_file)])
        assert "coco_arrays" not in check()[2]
        arrays_file.write_bytes(arrays_file.read_bytes()[:-1])
        status, _, err = check()
        assert status == 0
        assert f"warning: {arrays_file}: damaged, or older than instances_train2017.json, and not used. Run" in err
        assert f"python -m detection.data.coco_arrays {annotation_file}" in err
    finally:
        arrays_file.unlink()


@pytest.mark.parametrize(
    ("source", "warning"),
    [
        (GitState("a" * 40, dirty=True), "warning: source: files differ from commit aaaaaaaaaaaa. Commit them before"),
        (GitState("unknown", dirty=None), "warning: source: unknown commit. Run from the git repository"),
        (GitState("a" * 40, dirty=False), ""),
    ],
)
def test_source_that_cannot_be_submitted_is_a_warning(check, monkeypatch, source, warning):
    monkeypatch.setattr(run_checks.git_state, "read", lambda _: source)
    status, _, err = check()
    assert status == 0
    assert warning in err
    assert ("warning: source" in err) == bool(warning)
    assert "warning: source" not in check("--mode", "bench-train")[2]


def test_dry_run_creates_nothing_and_prints_everything(check, tmp_path):
    status, out, err = check("--dry-run", "--epochs", "7")
    assert (status, err) == (0, "")
    assert not (tmp_path / "results").exists()
    assert out.startswith("The run would start.\n")
    for part in ("epochs", "--epochs", "MLPerf 1.1.0 open", "24 images", "run folder"):
        assert part in out
    assert "momentum" not in out
    assert "momentum" in check("--dry-run", "--all")[1]


def test_dry_run_without_data_warns(check, tmp_path):
    status, out, _ = check("--dry-run", "--dataset", "coco2017", DATADIR=tmp_path / "absent")
    assert status == 0
    assert "warning: DATADIR=" in out


def test_missing_data_gives_one_error(check, tmp_path):
    status, _, err = check("--dataset", "coco2017", DATADIR=tmp_path / "absent")
    assert status == 2
    assert err.count("error:") == 1
    assert f"DATADIR={tmp_path / 'absent'}" in err


def test_missing_toy_images_are_generated(check, tmp_path, monkeypatch):
    spec = toy.ToySpec(train_images=24, val_images=4, seed=1)
    monkeypatch.setattr(toy, "ToySpec", lambda: spec)
    assert check("--dry-run", DATADIR=tmp_path / "new")[0] == 0
    assert not (tmp_path / "new").exists()
    assert check(DATADIR=tmp_path / "new")[0] == 0
    assert (tmp_path / "new/annotations/instances_train2017.json").is_file()


def test_wrong_num_classes_names_the_right_one(check):
    status, _, err = check("--num-classes", "81")
    assert status == 2
    assert "3 categories plus background make num_classes 4, not 81. Pass --num-classes 4" in err
    assert check("--num-classes", "4")[0] == 0


def test_data_set_wrongly_named_coco2017_is_rejected(check):
    status, out, err = check("--dataset", "coco2017")
    assert (status, out) == (2, "")
    assert "make num_classes 4, not 81" in err
    assert "--dataset with another name" in err


def custom_data_flags(data_dir):
    return [
        *("--train-images", str(data_dir / "train2017")),
        *("--train-annotations", str(data_dir / "annotations/instances_train2017.json")),
        *("--val-images", str(data_dir / "val2017")),
        *("--val-annotations", str(data_dir / "annotations/instances_val2017.json")),
    ]


def test_custom_data_settings_replace_datadir(check, data_dir, tmp_path):
    status, out, err = check(*custom_data_flags(data_dir), "--dataset", "shapes", DATADIR=tmp_path / "absent")
    assert (status, out.splitlines()[3]) == (0, "4")
    assert "train: 24 images" in err
    assert "classes: background, disc, square, triangle" in err


def test_three_of_four_custom_data_settings_name_the_missing_one(check, data_dir):
    status, _, err = check(*custom_data_flags(data_dir)[:-2], "--dataset", "shapes")
    assert status == 2
    assert "Also pass --val-annotations" in err
    assert "--train-images" not in err


def test_missing_custom_data_files_are_named(check, data_dir, tmp_path):
    flags = custom_data_flags(data_dir)
    flags[1], flags[7] = str(tmp_path / "nowhere"), str(tmp_path / "none.json")
    status, _, err = check(*flags, "--dataset", "shapes")
    assert status == 2
    for part in (f"{tmp_path / 'nowhere'}: image folder unreadable", f"{tmp_path / 'none.json'}: cannot be read"):
        assert part in err
    assert "Traceback" not in err


def test_batch_larger_than_the_data_set_is_rejected(check):
    assert check("--batch-size", "16")[0] == 0
    status, _, err = check("--batch-size", "16", DGXNGPU="8")
    assert status == 2
    assert "is 128 images per step" in err


def test_train_and_val_with_different_categories_are_rejected(check, data_dir, tmp_path):
    folder = tmp_path / "renamed"
    shutil.copytree(data_dir, folder)
    file = folder / "annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = "hexagon"
    file.write_text(json.dumps(content))
    status, _, err = check(DATADIR=folder)
    assert status == 2
    assert "val2017.json: categories: hexagon is not in" in err
    assert "which also has disc. Use the same names in both files" in err


@pytest.fixture
def custom_copy(data_dir, tmp_path):
    """Return flags of a copy of the data set, and a function that changes the annotations of a split."""
    folder = tmp_path / "custom"
    shutil.copytree(data_dir, folder)

    def change(split, function):
        file = folder / f"annotations/instances_{split}2017.json"
        content = json.loads(file.read_text())
        function(content)
        file.write_text(json.dumps(content))

    return [*custom_data_flags(folder), "--dataset", "shapes"], change


def test_val_with_fewer_categories_is_mapped_and_reported(check, custom_copy):
    flags, change = custom_copy

    def drop_discs(content):
        content["categories"] = [{"id": c["id"] - 1, "name": c["name"]} for c in content["categories"][1:]]
        kept = [a for a in content["annotations"] if a["category_id"] != 1]
        content["annotations"] = [a | {"category_id": a["category_id"] - 1} for a in kept]

    change("val", drop_discs)
    status, out, err = check(*flags)
    assert (status, out.splitlines()[3]) == (0, "4")
    assert "warning: " in err
    assert "categories: without disc of the training images, so the metric leaves them out" in err


def test_suspicious_boxes_and_filled_fields_are_warnings(check, custom_copy):
    flags, change = custom_copy

    def to_corners(content):
        for row in content["annotations"]:
            left, top, width, height = row["bbox"]
            row["bbox"] = [left, top, left + width, top + height]
            del row["iscrowd"]

    change("train", to_corners)
    status, _, err = check(*flags)
    assert status == 0
    assert "train2017.json: " in err
    assert "they look like corners [x1, y1, x2, y2]. Convert them" in err
    assert "annotations have no 'iscrowd': 0" in err


def test_wrong_sizes_of_custom_data_are_an_error(check, custom_copy):
    flags, change = custom_copy

    def enlarge(content):
        for image in content["images"]:
            image["width"], image["height"] = 2 * image["width"], 2 * image["height"]

    change("val", enlarge)
    status, _, err = check(*flags)
    assert status == 2
    assert "The boxes are of a copy scaled by 2: scale width, height and boxes" in err
    assert "This is the first of 4 such images of 4." in err
    assert "init_datasets" not in err


def test_val_with_only_crowds_is_rejected_before_the_run(check, data_dir, tmp_path):
    val = json.loads((data_dir / "annotations/instances_val2017.json").read_text())
    for row in val["annotations"]:
        row["iscrowd"] = 1
    (tmp_path / "val.json").write_text(json.dumps(val))
    flags = custom_data_flags(data_dir)
    flags[-1] = str(tmp_path / "val.json")
    status, _, err = check(*flags, "--dataset", "shapes")
    assert status == 2
    assert f"val.json: all {len(val['annotations'])} boxes have iscrowd 1" in err


def test_each_invalid_setting_gives_one_error_line(check):
    status, out, err = check("--epochs", "0", "--no-such-flag", "1")
    assert (status, out) == (2, "")
    assert [line.split(":")[0] for line in err.splitlines()] == ["error", "error"]


def test_errors_of_data_and_backbone_are_reported_together(check):
    status, _, err = check("--num-classes", "81", "--batch-size", "1000", "--pretrained-backbone", "absent.pth")
    assert status == 2
    for part in ("--num-classes 4", "--batch-size", "absent.pth: no such file"):
        assert part in err


def npz(folder: Path) -> Path:
    path = folder / "weights.npz"
    np.savez(path, **{"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)})
    return path


def test_intact_backbone_passes(check, tmp_path):
    assert check("--pretrained-backbone", str(npz(tmp_path)))[0] == 0
    content = b"\x80\x02 as torch wrote them once"
    published = tmp_path / f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    published.write_bytes(content)
    assert check("--pretrained-backbone", str(published))[0] == 0


def test_truncated_backbone_is_rejected(check, tmp_path):
    path = npz(tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    status, _, err = check("--pretrained-backbone", str(path))
    assert status == 2
    assert "damaged or truncated" in err


def test_insufficient_shared_memory_reports_both_sizes(check, monkeypatch):
    nearly_full = SimpleNamespace(f_bavail=10, f_frsize=4096)
    monkeypatch.setattr(worker_shm.os, "statvfs", lambda _: nearly_full)
    status, _, err = check("--num-workers", "2", "--batch-size", "4")
    assert status == 2
    assert "/dev/shm: 0.0 MiB free, but 2 data workers may need 6 MiB" in err
    assert check("--num-workers", "0", "--batch-size", "4")[0] == 0


def test_backbone_with_flipped_bits_is_rejected(check, tmp_path):
    path = npz(tmp_path)
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    assert check("--pretrained-backbone", str(path))[0] == 2


def test_backbone_with_wrong_checksum_is_rejected(check, tmp_path):
    path = tmp_path / "resnet34-333f7ec4.pth"
    path.write_bytes(b"\x80\x02 something else")
    status, _, err = check("--pretrained-backbone", str(path))
    assert status == 2
    assert "instead of 333f7ec4" in err


def test_existing_log_is_not_overwritten(check, tmp_path):
    (tmp_path / "result_0.txt").touch()
    status, _, err = check(RUN_DIR=tmp_path)
    assert status == 2
    assert "result_0.txt already exists" in err
    assert check("--run-index", "1", RUN_DIR=tmp_path)[0] == 0


def test_unwritable_run_folder_is_rejected(check, tmp_path):
    (tmp_path / "file").touch()
    status, _, err = check(LOGDIR=tmp_path / "file")
    assert status == 2
    assert "cannot be written" in err


def test_only_the_first_node_creates_the_run_folder(check, tmp_path):
    assert check(DGXNNODES="2", NODE_RANK="1")[0] == 0
    assert not (tmp_path / "results").exists()


def closed(data_dir, *flags):
    """Return flags of the closed division on generated images."""
    data = ("--dataset", "coco2017", "--num-classes", "4", "--pretrained-backbone", str(npz(data_dir.parent)))
    return (*custom_data_flags(data_dir), *data, "--division", "closed", *flags)


EVAL_EVERY_5 = ("--eval-epochs", "every 5")


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_closed_run_that_breaks_a_rule_is_rejected_with_its_name(check, data_dir, dry_run, tmp_path):
    flags = closed(
        data_dir, *EVAL_EVERY_5, "--target", "0.1", "--lr-decay-epochs", "3,5", "--flip", "horizontal+vertical"
    )
    status, out, err = check(*flags, *dry_run)
    assert status == 2
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    rules = ("target", "opt_learning_rate_decay_boundary_epochs", "flip")
    assert sorted(line.split("forbids ")[1].split(":")[0] for line in errors) == sorted(rules)
    assert all(line.endswith("Change it, or pass --division open") for line in errors)
    assert bool(out) == bool(dry_run)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("ruleset", "schedule", "points"),
    [("0.7.0", "40,50,55,60,65,70,75,80", "ruleset 0.7.0 has no reference points"),
     ("1.0.0", "every 5", "compared with the reference at batch 1024: 50 epochs"),
     ("1.1.0", "every 5", "compared with the reference at batch 1024: 50 epochs")],
)  # fmt: skip
def test_report_lists_the_verdict_on_each_value(check, data_dir, ruleset, schedule, points):
    status, _, err = check(*closed(data_dir, "--ruleset", ruleset, "--eval-epochs", schedule))
    assert status == 0, err
    assert f"MLPerf {ruleset} closed: " in err
    for part in (
        "global_batch_size: 4",
        "opt_base_learning_rate: 0.0003125 (allowed: any value)",
        "opt_learning_rate_decay_boundary_epochs: [44, 55] (allowed: [40, 50]·(1 + k/10)",
        "opt_learning_rate_warmup_steps: 300",
        "max_samples: 1 (allowed: value in [1, 50])",
        f"as scheduled in {ruleset}",
        "target: 0.23",
        f"reference_convergence: {points}",
    ):
        assert part in err
    assert "same as the reference: optimizer, momentum, lr_decay_factor" in err
    assert "forbids" not in err
    assert check(*closed(data_dir, "--ruleset", ruleset, "--eval-epochs", "7"))[0] == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--seed", "1"), "seed: 1 (allowed: none: taken from the clock or the system's randomness)"),
        (("--pretrained-backbone", ""), "pretrained_backbone: none (allowed: ImageNet weights"),
        (("--skip-missing-images",), "skip_missing_images: True (allowed: False"),
    ],
)
def test_closed_rejects_a_chosen_seed_a_random_backbone_and_skipped_images(check, data_dir, flags, message):
    status, _, err = check(*closed(data_dir, *EVAL_EVERY_5), *flags)
    assert (status, err.count("forbids")) == (2, 1)
    assert f"error: MLPerf 1.1.0 closed forbids {message}" in err
    status, _, err = check(*closed(data_dir, *EVAL_EVERY_5), *flags, "--division", "open")
    assert status == 0
    assert f"note: closed would reject {message}" in err


def test_open_division_notes_what_closed_would_reject(check):
    status, _, err = check("--momentum", "0.8")
    assert status == 0
    assert "note: closed would reject dataset: toy" in err
    assert "note: closed would reject momentum: 0.8" in err
    assert "reject target" not in err


def test_rounded_learning_rate_is_reported(check):
    assert "peak learning rate 0.0003125: not rounded" in check()[2]
    rounded = check("--lr-round-to", "0.0025")[2]
    assert "peak learning rate 0.0025: rounded from 0.0003125 by lr_round_to" in rounded
    whole = check("--lr-round-to", "0.0025", "--base-lr", "3.2e-3", "--batch-size", "2400", "--dry-run")[1]
    assert "peak learning rate 0.24: not rounded" in whole  # the unrounded product is 0.24000000000000002


def test_mask_rcnn_has_its_own_rules_and_reads_masks(check, data_dir, tmp_path, capsys):
    check()
    flags = ["--dataset", "coco2017", "--num-classes", "4", "--batch-size", "1", "--num-workers", "0"]
    flags += ["--pretrained-backbone", str(npz(tmp_path))]
    assert commands.maskrcnn("preflight", *custom_data_flags(data_dir), *flags, "--dry-run") == 0
    capsys.readouterr()
    status = commands.maskrcnn("preflight", *custom_data_flags(data_dir), *flags, "--ruleset", "1.1.0")
    err = capsys.readouterr().err
    assert status == 2
    forbidden = [line.split("forbids ")[1].split(":")[0] for line in err.splitlines() if "forbids" in line]
    assert forbidden == ["opt_base_learning_rate"]  # for one image per step, until 2.0.0
    folder = tmp_path / "no masks"
    shutil.copytree(data_dir, folder)
    file = folder / "annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation["segmentation"] = "none"
    file.write_text(json.dumps(content))
    assert check(*custom_data_flags(folder), "--dataset", "shapes")[0] == 0  # the boxes are still valid
    flags = ["--dataset", "shapes", "--division", "open", "--batch-size", "2", "--num-workers", "0"]
    assert commands.maskrcnn("preflight", *custom_data_flags(folder), *flags) == 2
    assert "segmentation" in capsys.readouterr().err
    assert commands.maskrcnn("preflight", *custom_data_flags(data_dir), *flags, "--run-dir", tmp_path / "run") == 0


def test_mask_rcnn_sizes_shared_memory_by_padded_images():
    def image_bytes(*flags):
        return maskrcnn_commands.PREFLIGHT.image_bytes(maskrcnn_commands.load(flags).config)

    assert image_bytes() == 3 * 800 * 1344
    assert image_bytes("--no-group-by-aspect-ratio") == 3 * 1344 * 1344


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_config_file_passes_a_dry_run_and_the_rules(name, monkeypatch, capsys):
    stem, _, workload = name.rpartition("_")
    system, command = (stem, getattr(commands, workload)) if workload in BENCHMARKS else (name, commands.ssd)
    set_only(monkeypatch, exported(name, DGXSYSTEM=system))
    assert command("preflight", "--dry-run") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "forbids" not in out


def test_weights_must_match_the_number_of_classes(check, tmp_path):
    for num_classes, status in ((4, 0), (5, 2)):
        path = tmp_path / f"{num_classes}.pt"
        torch.save(SSD300(num_classes, "resnet18").state_dict(), path)
        exit_status, _, err = check("--mode", "evaluate", "--weights", str(path), "--backbone", "resnet18")
        assert exit_status == status, err
        assert ("ssd300-r34 on resnet18 for 4 classes" if num_classes == 4 else "holds 5 classes, with the") in err
    status, _, err = check("--weights", str(path), "--backbone", "resnet18", "--pretrained-backbone", "")
    assert status == 0, err
    assert "for 5 classes; " in err
    assert "but the outputs of all 4 classes initialized (heads.0, " in err


def test_device_that_is_missing_and_checkpoint_that_is_missing_stop_the_script_before_the_run(tmp_path, data_dir):
    """Real script and preflight. Only setup.sh, which would install packages, is a stub."""
    shutil.copytree(ROOT / "scripts/lib", tmp_path / "scripts/lib")
    for name in ("run_and_time.sh", "config_toy.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "setup.sh").write_text("#!/bin/sh\n")
    (tmp_path / "setup.sh").chmod(0o755)
    environ = {"PATH": os.environ["PATH"], "VENV": sys.prefix, "PYTHONPATH": str(ROOT), "DATADIR": str(data_dir)}
    command = ["./run_and_time.sh", "--device", "xpu", "--resume", "absent.pt", "--batch-size", "4"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert [error.split(": ")[1] for error in errors] == ["--device xpu", "absent.pt"]
    assert errors[0].endswith("Pass --device auto or cpu.")
    assert not (tmp_path / "results").exists()


def test_unavailable_device_is_a_warning_of_a_dry_run(check):
    status, out, err = check("--device", "xpu", "--dry-run")
    assert (status, err) == (0, "")
    assert "warning: --device xpu: torch" in out


def save_checkpoint(path, **changes):
    """Save a checkpoint of a small network in the middle of its training. Return its path."""
    model = SSD300(4, "resnet18")
    sgd = optim.build_optimizer(model, backend="torch", momentum=0.9, weight_decay=0.0)
    config = load(["--backbone", "resnet18"], {}).config
    state = {"format": checkpointer.FORMAT, "benchmark": "ssd", "seed": 5, "epoch": 40, "evaluated": True}
    state |= {"model": model.state_dict(), "optimizer": sgd.state_dict(), "config": to_json(config)}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state | changes, path)
    return path


def test_checkpoint_of_resume_auto_must_fit_the_settings(check, tmp_path):
    flags = ("--resume", "auto", "--backbone", "resnet18")
    assert check(*flags)[0] == 0
    run = tmp_path / "run"
    path = save_checkpoint(run / "checkpoints" / "epoch_0040_step_0000100.pt")
    status, _, err = check(*flags, RUN_DIR=run)
    assert status == 0
    assert f"resume: {path} (" in err
    status, _, err = check(*flags, "--bias-lr-factor", "2", RUN_DIR=run)
    assert status == 2
    assert f"error: {path}: checkpoint of another optimizer" in err


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({}, (), ""),
        ({"benchmark": "maskrcnn"}, (), "checkpoint of maskrcnn, not of ssd"),
        ({"epoch": 80}, (), "all 80 epochs are complete"),
        ({}, ("--seed", "6"), "was trained with seed 5"),
        ({}, ("--backbone", "resnet34"), "but the settings ask for ssd300-r34 on resnet34"),
        ({}, ("--bias-lr-factor", "2"), "another optimizer, sgd of 77 parameters instead of sgd of 31 + 46 parameters"),
        ({}, ("--bias-lr-factor", "2"), "Set bias_lr_factor 1.0 as in the run that wrote it."),
        ({}, ("--optimizer", "adam"), "Set optimizer sgd as in the run that wrote it."),
        ({}, ("--freeze-batch-norm",), "Set freeze_batch_norm False as in the run that wrote it."),
    ],
)
def test_checkpoint_to_resume_must_fit_the_settings(check, tmp_path, changes, flags, message):
    path = save_checkpoint(tmp_path / "checkpoint.pt", **changes)
    status, _, err = check("--resume", str(path), "--backbone", "resnet18", *flags)
    assert status == (2 if message else 0), err
    assert err.count("error:") == bool(message)
    assert (message or f"resume: {path} (this program; ssd300-r34 on resnet18 for 4 classes; ") in err
    assert (tmp_path / "results").exists() == (not message)
    if message:
        assert check("--resume", str(path), "--backbone", "resnet18", *flags, NODE_RANK="1", DGXNNODES="2")[0] == 0


@pytest.mark.parametrize(
    ("names", "with_weights", "with_resume", "when_evaluated"),
    [("disc square triangle", 0, 0, 0), ("triangle square disc", 0, 2, 0), ("disc square hexagon", 0, 2, 2)],
)
def test_categories_of_a_checkpoint_are_compared_by_name(
    check, tmp_path, names, with_weights, with_resume, when_evaluated
):
    categories = [{"id": number, "name": name} for number, name in enumerate(names.split(), start=1)]
    path = str(save_checkpoint(tmp_path / "checkpoint.pt", categories=categories))
    for flags, expected in (
        (("--weights", path), with_weights),
        (("--resume", path), with_resume),
        (("--mode", "evaluate", "--weights", path), when_evaluated),
    ):
        status, _, err = check(*flags, "--backbone", "resnet18", "--pretrained-backbone", "")
        assert status == expected, err
        assert ("the annotations have disc, square, triangle" in err) == bool(expected)
