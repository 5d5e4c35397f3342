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

from detection.data import worker_shm
from detection.synthetic import toy
from maskrcnn import preflight as maskrcnn_preflight
from paths import ROOT
from ssd import preflight
from ssd.model import SSD300

SYSTEMS = sorted(path.stem.removeprefix("config_") for path in ROOT.glob("config_*.sh") if "_maskrcnn" not in path.stem)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    toy.draw(folder, toy.Drawing(train_images=24, val_images=4, seed=0))
    return folder


@pytest.fixture
def check(monkeypatch, tmp_path, pictures, capsys):
    """Run preflight on the drawn pictures; returns status, stdout, stderr."""
    for name in [name for name in os.environ if name.startswith(("SSD_", "DGX"))]:
        monkeypatch.delenv(name)
    for name in ("RUN_DIR", "NODE_RANK", "RUN_INDEX", "PAGE_CACHE_DROPPED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOGDIR", str(tmp_path / "results"))
    monkeypatch.setenv("DATADIR", str(pictures))

    def run(*argv, **environ):
        for name, value in environ.items():
            monkeypatch.setenv(name, str(value))
        recipe = ["--dataset", "toy", "--division", "open", "--batch-size", "4"]
        status = preflight.main([*recipe, *argv])
        return status, *capsys.readouterr()

    return run


def test_a_good_run_prints_its_organisation_and_folder_and_the_counts(check, tmp_path):
    status, out, err = check("--org", "Some Lab")
    org, folder, mode, num_classes = out.splitlines()
    assert (status, org, mode, num_classes) == (0, "Some Lab", "train", "4")
    assert Path(folder).is_dir()
    assert Path(folder).parent == tmp_path / "results/toy/ssd"
    assert "train: 24 images" in err
    assert "val: 4 images" in err


def test_a_dry_run_makes_nothing_and_says_all(check, tmp_path):
    status, out, err = check("--dry-run", "--epochs", "7")
    assert (status, err) == (0, "")
    assert not (tmp_path / "results").exists()
    for part in ("epochs", "--epochs", "default", "MLPerf 1.1.0 open", "24 images", "run folder"):
        assert part in out


def test_a_dry_run_without_data_warns(check, tmp_path):
    status, out, _ = check("--dry-run", "--dataset", "coco2017", DATADIR=tmp_path / "absent")
    assert status == 0
    assert "warning: DATADIR=" in out


def test_absent_data_is_refused_once(check, tmp_path):
    status, _, err = check("--dataset", "coco2017", DATADIR=tmp_path / "absent")
    assert status == 2
    assert err.count("error:") == 1
    assert f"DATADIR={tmp_path / 'absent'}" in err


def test_the_toy_pictures_are_drawn_where_there_are_none(check, tmp_path, monkeypatch):
    few = toy.Drawing(train_images=24, val_images=4, seed=1)
    monkeypatch.setattr(toy, "Drawing", lambda: few)
    assert check("--dry-run", DATADIR=tmp_path / "new")[0] == 0
    assert not (tmp_path / "new").exists()
    assert check(DATADIR=tmp_path / "new")[0] == 0
    assert (tmp_path / "new/annotations/instances_train2017.json").is_file()


def test_a_wrong_number_of_classes_is_answered_with_the_right_one(check):
    status, _, err = check("--num-classes", "81")
    assert status == 2
    assert "has 3 categories: with the background num_classes is 4, not 81. Pass --num-classes 4" in err
    assert check("--num-classes", "4")[0] == 0


def test_data_that_are_called_coco_and_are_not_are_refused(check):
    status, out, err = check("--dataset", "coco2017")
    assert (status, out) == (2, "")
    assert "num_classes is 4, not 81" in err
    assert "--dataset with a name of theirs" in err


def own_data(pictures):
    return [
        *("--train-images", str(pictures / "train2017")),
        *("--train-annotations", str(pictures / "annotations/instances_train2017.json")),
        *("--val-images", str(pictures / "val2017")),
        *("--val-annotations", str(pictures / "annotations/instances_val2017.json")),
    ]


def test_data_named_by_four_settings_take_the_place_of_datadir(check, pictures, tmp_path):
    status, out, err = check(*own_data(pictures), "--dataset", "shapes", DATADIR=tmp_path / "absent")
    assert (status, out.splitlines()[3]) == (0, "4")
    assert "train: 24 images" in err
    assert "classes: background, disc, square, triangle" in err


def test_three_of_the_four_settings_are_refused_with_the_name_of_the_fourth(check, pictures):
    status, _, err = check(*own_data(pictures)[:-2], "--dataset", "shapes")
    assert status == 2
    assert "--val-annotations should be given, too" in err
    assert "--train-images should" not in err


def test_files_of_own_data_that_are_not_there_are_named(check, pictures, tmp_path):
    flags = own_data(pictures)
    flags[1], flags[7] = str(tmp_path / "nowhere"), str(tmp_path / "none.json")
    status, _, err = check(*flags, "--dataset", "shapes")
    assert status == 2
    for part in (f"{tmp_path / 'nowhere'}: no folder of images", f"{tmp_path / 'none.json'}: cannot be read"):
        assert part in err
    assert "Traceback" not in err


def test_a_batch_larger_than_the_data_is_refused(check):
    assert check("--batch-size", "16")[0] == 0
    status, _, err = check("--batch-size", "16", DGXNGPU="8")
    assert status == 2
    assert "is 128 images a step" in err


def test_train_and_val_of_different_categories_are_refused(check, pictures, tmp_path):
    folder = tmp_path / "renamed"
    shutil.copytree(pictures, folder)
    file = folder / "annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = "hexagon"
    file.write_text(json.dumps(content))
    status, _, err = check(DATADIR=folder)
    assert status == 2
    assert "other categories" in err


def test_mistakes_of_settings_are_errors_a_line_each(check):
    status, out, err = check("--epochs", "0", "--no-such-flag", "1")
    assert (status, out) == (2, "")
    assert [line.split(":")[0] for line in err.splitlines()] == ["error", "error"]


def test_mistakes_of_data_and_backbone_are_reported_together(check):
    status, _, err = check("--num-classes", "81", "--batch-size", "1000", "--pretrained-backbone", "absent.pth")
    assert status == 2
    for part in ("--num-classes 4", "--batch-size", "absent.pth is not there"):
        assert part in err


def npz(folder: Path) -> Path:
    path = folder / "weights.npz"
    np.savez(path, **{"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)})
    return path


def test_a_sound_backbone_passes(check, tmp_path):
    assert check("--pretrained-backbone", str(npz(tmp_path)))[0] == 0
    content = b"\x80\x02 as torch wrote them once"
    published = tmp_path / f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    published.write_bytes(content)
    assert check("--pretrained-backbone", str(published))[0] == 0


def test_a_backbone_that_is_cut_off_is_refused(check, tmp_path):
    path = npz(tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    status, _, err = check("--pretrained-backbone", str(path))
    assert status == 2
    assert "damaged or cut off" in err


def test_too_little_shared_memory_is_an_error_with_both_numbers(check, monkeypatch):
    scarce = SimpleNamespace(f_bavail=10, f_frsize=4096)
    monkeypatch.setattr(worker_shm.os, "statvfs", lambda _: scarce)
    status, _, err = check("--num-workers", "2", "--batch-size", "4")
    assert status == 2
    assert "/dev/shm has 0.0 MiB free, and 2 data workers may need 6 MiB" in err
    assert check("--num-workers", "0", "--batch-size", "4")[0] == 0


def test_a_backbone_with_flipped_bits_is_refused(check, tmp_path):
    path = npz(tmp_path)
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    assert check("--pretrained-backbone", str(path))[0] == 2


def test_a_backbone_that_is_not_what_its_name_says_is_refused(check, tmp_path):
    path = tmp_path / "resnet34-333f7ec4.pth"
    path.write_bytes(b"\x80\x02 something else")
    status, _, err = check("--pretrained-backbone", str(path))
    assert status == 2
    assert "not with 333f7ec4" in err


def test_a_log_that_is_there_is_not_written_over(check, tmp_path):
    (tmp_path / "result_0.txt").touch()
    status, _, err = check(RUN_DIR=tmp_path)
    assert status == 2
    assert "result_0.txt is there already" in err
    assert check("--run-index", "1", RUN_DIR=tmp_path)[0] == 0


def test_a_run_folder_that_cannot_be_made_is_refused(check, tmp_path):
    (tmp_path / "file").touch()
    status, _, err = check(LOGDIR=tmp_path / "file")
    assert status == 2
    assert "cannot be written" in err


def test_only_the_first_node_makes_the_run_folder(check, tmp_path):
    assert check(DGXNNODES="2", NODE_RANK="1")[0] == 0
    assert not (tmp_path / "results").exists()


def closed(pictures, *flags):
    """A recipe of the closed division on the drawn pictures."""
    data = (
        *own_data(pictures),
        "--dataset",
        "coco2017",
        "--num-classes",
        "4",
        "--pretrained-backbone",
        str(npz(pictures.parent)),
    )
    return (*data, "--division", "closed", *flags)


EVERY_FIFTH = ("--eval-epochs", "every 5")


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_a_closed_run_that_breaks_a_rule_is_refused_with_its_name(check, pictures, dry_run, tmp_path):
    flags = closed(
        pictures, *EVERY_FIFTH, "--target", "0.1", "--lr-decay-epochs", "3,5", "--flip", "horizontal+vertical"
    )
    status, out, err = check(*flags, *dry_run)
    assert status == 2
    mistakes = [line for line in err.splitlines() if line.startswith("error:")]
    rules = ("target", "opt_learning_rate_decay_boundary_epochs", "flip")
    assert sorted(line.split("forbids ")[1].split(":")[0] for line in mistakes) == sorted(rules)
    assert all(line.endswith("Change it, or pass --division open") for line in mistakes)
    assert bool(out) == bool(dry_run)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("ruleset", "schedule", "points"),
    [("0.7.0", "40,50,55,60,65,70,75,80", "ruleset 0.7.0 has no reference points"),
     ("1.0.0", "every 5", "held to the reference at batch 1024: 50 epochs"),
     ("1.1.0", "every 5", "held to the reference at batch 1024: 50 epochs")],
)  # fmt: skip
def test_every_start_says_what_the_ruleset_makes_of_each_value(check, pictures, ruleset, schedule, points):
    status, _, err = check(*closed(pictures, "--ruleset", ruleset, "--eval-epochs", schedule))
    assert status == 0, err
    assert f"MLPerf {ruleset} closed: " in err
    for part in (
        "global_batch_size: 4",
        "opt_base_learning_rate: 0.0003125 (allowed: > 0",
        "opt_learning_rate_decay_boundary_epochs: [44, 55] (allowed: [40, 50]·(1 + k/10)",
        "opt_learning_rate_warmup_steps: 300",
        "max_samples: 1 (allowed: 1 or 50)",
        f"as scheduled in {ruleset}",
        "target: 0.23",
        f"reference_convergence: {points}",
    ):
        assert part in err
    assert "as in the reference: momentum, lr_decay_factor" in err
    assert "forbids" not in err
    assert check(*closed(pictures, "--ruleset", ruleset, "--eval-epochs", "7"))[0] == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--seed", "1"), "seed: 1 (allowed: none: from the clock or the system's randomness)"),
        (("--pretrained-backbone", ""), "backbone: none (allowed: weights of the ImageNet trunk"),
        (("--skip-missing-images",), "skip_missing_images: True (allowed: False"),
    ],
)
def test_a_seed_that_is_chosen_an_untrained_trunk_and_images_left_out_are_not_for_closed(check, pictures, flags, said):
    status, _, err = check(*closed(pictures, *EVERY_FIFTH), *flags)
    assert (status, err.count("forbids")) == (2, 1)
    assert f"error: MLPerf 1.1.0 closed forbids {said}" in err
    status, _, err = check(*closed(pictures, *EVERY_FIFTH), *flags, "--division", "open")
    assert status == 0
    assert f"note: closed would refuse {said}" in err


def test_the_open_division_starts_and_notes_what_the_closed_one_would_refuse(check):
    status, _, err = check("--momentum", "0.8")
    assert status == 0
    assert "note: closed would refuse dataset: toy" in err
    assert "note: closed would refuse momentum: 0.8" in err
    assert "refuse target" not in err


def test_a_rate_that_is_rounded_is_said_to_be(check):
    assert "peak learning rate 0.0003125: not rounded" in check()[2]
    rounded = check("--lr-round-to", "0.0025")[2]
    assert "peak learning rate 0.0025: rounded from 0.0003125 by lr_round_to" in rounded
    whole = check("--lr-round-to", "0.0025", "--base-lr", "3.2e-3", "--batch-size", "2400", "--dry-run")[1]
    assert "peak learning rate 0.24: not rounded" in whole  # 0.24000000000000002 before


def test_mask_rcnn_is_held_to_its_own_rules_and_its_masks_are_read(check, pictures, tmp_path, capsys):
    check()
    flags = ["--dataset", "coco2017", "--num-classes", "4", "--batch-size", "1", "--num-workers", "0"]
    flags += ["--pretrained-backbone", str(npz(tmp_path))]
    status = maskrcnn_preflight.main([*own_data(pictures), *flags])
    err = capsys.readouterr().err
    assert status == 2
    forbidden = [line.split("forbids ")[1].split(":")[0] for line in err.splitlines() if "forbids" in line]
    assert forbidden == ["opt_base_learning_rate"]  # of one image a step
    folder = tmp_path / "no masks"
    shutil.copytree(pictures, folder)
    file = folder / "annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation["segmentation"] = "none"
    file.write_text(json.dumps(content))
    assert check(*own_data(folder), "--dataset", "shapes")[0] == 0  # boxes alone are there
    flags = ["--dataset", "shapes", "--division", "open", "--batch-size", "2", "--num-workers", "0"]
    assert maskrcnn_preflight.main([*own_data(folder), *flags]) == 2
    assert "segmentation" in capsys.readouterr().err
    assert maskrcnn_preflight.main([*own_data(pictures), *flags, "--run-dir", str(tmp_path / "run")]) == 0


def test_shared_memory_is_sized_by_the_padded_images_of_mask_rcnn():
    def image_bytes(*flags):
        return maskrcnn_preflight.CHECKS.image_bytes(maskrcnn_preflight.load(flags).config)

    assert image_bytes() == 3 * 800 * 1344
    assert image_bytes("--no-aspect-groups") == 3 * 1344 * 1344


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_config_file_passes_a_dry_run_and_the_rules(system):
    benchmark = "maskrcnn" if system.endswith("_maskrcnn") else "ssd"
    script = f'source ./config_{system}.sh; exec "$0" -m {benchmark}.preflight --dry-run'
    environ = {"PATH": os.environ["PATH"], "DGXSYSTEM": system}
    shell = subprocess.run(
        ["bash", "-euc", script, sys.executable], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert (shell.returncode, shell.stderr) == (0, "")
    assert "forbids" not in shell.stdout


def test_a_checkpoint_is_held_against_the_classes_of_the_annotations(check, tmp_path):
    for num_classes, status in ((4, 0), (5, 2)):
        path = tmp_path / f"{num_classes}.pt"
        torch.save(SSD300(num_classes, "resnet18").state_dict(), path)
        got, _, err = check("--mode", "evaluate", "--weights", str(path), "--backbone", "resnet18")
        assert got == status, err
        assert f"ssd300-r34 on resnet18 for {num_classes} classes" in err
