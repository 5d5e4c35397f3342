"""docs/ADDING_A_SYSTEM.md: its commands run, and it explains each line that a config file has."""

import os
import re
import subprocess
import sys

import pytest

from paths import ROOT

TEXT = (ROOT / "docs/ADDING_A_SYSTEM.md").read_text()
COMMANDS = re.findall(r"^\$ (.*)$", TEXT, re.MULTILINE)
SMALL = "--device cpu --batch-size 2 --backbone resnet18 --dataset toy --division open --num-workers 0 --precision fp32"
FEW_STEPS = " --benchmark-warmup 0 --benchmark-input synthetic --compile off"


@pytest.fixture
def clone(tmp_path):
    """The repository's files, with an environment that is made already."""
    for path in ROOT.iterdir():
        if path.name in ("ssd", "maskrcnn", "detection", "mlperf"):
            (tmp_path / path.name).symlink_to(path)
        elif path.suffix == ".sh":
            (tmp_path / path.name).write_bytes(path.read_bytes())
            (tmp_path / path.name).chmod(0o755)
    (tmp_path / "setup.sh").write_text("#!/bin/sh\n")
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return tmp_path


def run(command, clone, data):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SSD_", "DGX"))}
    environment |= {
        "VENV": "venv",
        "PYTHONPATH": str(clone),
        "OMP_NUM_THREADS": "1",
        "DGXNGPU": "1",
        "CLEAR_CACHES": "0",
    }
    return subprocess.run(
        ["bash", "-c", command.replace("DATADIR=DIR", f"DATADIR={data}")],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_commands_are_read():
    assert [command.split()[-1] for command in COMMANDS] == ["mine", "config_mine.sh", "--dry-run", "--preflight", "20"]


def test_a_copied_file_is_what_a_dry_run_shows(clone, four_image_coco):
    copy, dry_run = COMMANDS[1:3]
    assert run(dry_run, clone, four_image_coco).returncode == 2  # nothing is copied yet
    assert run(copy, clone, four_image_coco).returncode == 0
    done = run(dry_run, clone, four_image_coco)
    assert done.returncode == 0, done.stderr
    for part in ("batch_size          114 images", "MLPerf 1.1.0 closed: reference_convergence", "launch:"):
        assert part in done.stdout
    done = run(f"{dry_run} --lr-decay-epochs 3,5", clone, four_image_coco)
    assert done.returncode == 2
    assert "forbids opt_learning_rate_decay_boundary_epochs" in done.stderr
    assert "launch:" not in done.stdout


@pytest.mark.slow
def test_the_preflight_of_a_copied_file_checks_the_machine_and_starts_no_run(clone, four_image_coco):
    run(COMMANDS[1], clone, four_image_coco)
    done = run(f"{COMMANDS[3]} {SMALL} --pretrained-backbone ''", clone, four_image_coco)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("ready: ")
    assert "STARTING" not in done.stdout
    assert not (clone / "results").exists()
    checks = {line.split("  ")[1] for line in done.stdout.splitlines() if line[:4] in ("pass", "warn", "fail")}
    section = TEXT.split("| check | warns | fails |")[1].split("\n\n")[0]
    told = {name for row in section.splitlines()[2:] for name in row.split("|")[1].strip().split(", ")}
    assert checks <= told
    assert told - checks == {"COCO 2017", "checksum"}


@pytest.mark.slow
def test_the_speed_of_a_copied_file_is_measured(clone, four_image_coco):
    run(COMMANDS[1], clone, four_image_coco)
    done = run(COMMANDS[4].replace("20", "1") + f" {SMALL} {FEW_STEPS}", clone, four_image_coco)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "img/s" in done.stdout


@pytest.mark.slow
def test_a_measured_file_passes_a_dry_run(clone, four_image_coco):
    command = f"DATADIR=DIR {COMMANDS[0].replace('300', '60')} --backbone resnet18 --batch-size 2 --num-workers 0"
    done = run(command, clone, four_image_coco)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (clone / "config_mine.sh").is_file()
    done = run(COMMANDS[2], clone, four_image_coco)
    assert done.returncode == 0, done.stderr


def test_every_line_of_the_config_files_is_explained():
    lines = "\n".join(path.read_text() for path in ROOT.glob("config_*.sh") if "_maskrcnn" not in path.name)
    explained = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", TEXT.split("## Copied")[1].split("## Checked")[0]))
    assert set(re.findall(r"export ([A-Z0-9_]+)=", lines)) == explained - {"PRETRAINED_DIR", "MASKRCNN_"}
