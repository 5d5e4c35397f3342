"""Pages that show code, output or files, compared with a real run."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from paths import ROOT
from script_clone import run_command


def page(name: str) -> str:
    return (ROOT / name).read_text()


def mask(line: str) -> str:
    """Replace what differs between runs: numbers, dates, and the padding around them."""
    return re.sub(r"\s+", " ", re.sub(r"-?\d[\d.,:]*|\b[AP]M\b|\b(above|below)\b", "#", line)).strip()


def test_readme_shows_the_output_of_a_run(small_run):
    """Each line of the sample is one of the output, in the same order. `...` stands for omitted text."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page("README.md"), re.MULTILINE | re.DOTALL)
    first = next(i for i, (_, text) in enumerate(blocks) if "$ ./run_and_time.sh" in text)
    sample = next(text for language, text in blocks[first:] if language != "console")
    output = iter([mask(line) for line in small_run.output.splitlines()])
    for line in filter(None, (line.strip().removesuffix("...") for line in sample.splitlines())):
        wanted = mask(line)
        assert any(wanted in shown for shown in output), line


def test_run_folder_page_lists_every_file(small_run):
    named = set(re.findall(r"`([\w.]+/?)`", page("docs/RUN_FOLDER.md")))
    written = {path.name + "/" * path.is_dir() for path in small_run.folder.iterdir()}
    assert {"report.html", "checkpoints/", "classes.json", "pictures.json"} <= written <= named
    assert (small_run.clone / "summary.json").exists()


def test_snippets_of_the_python_api_run(small_run, four_image_coco, monkeypatch, capsys):
    monkeypatch.chdir(small_run.clone)
    image = next((four_image_coco / "val2017").iterdir())
    namespace: dict[str, object] = {}
    for snippet in re.findall(r"^```python\n(.*?)^```", page("docs/PYTHON_API.md"), re.MULTILINE | re.DOTALL):
        code = snippet.replace("results/toy/ssd/START", str(small_run.folder))
        exec(re.sub(r"data/toy/val2017/\w+\.jpg", str(image), code), namespace)
    assert namespace["losses"]
    assert namespace["metrics"]["AP"] == pytest.approx(namespace["run"].metrics["AP"], abs=1e-9)
    assert capsys.readouterr().out.splitlines()[-1].startswith("success 1 {'AP': 0.0}")


def test_tutorial_quotes_the_code_that_it_changes():
    (line,) = re.findall(r"^(\w+ = )\(.*#", page("docs/TUTORIAL.md"), re.MULTILINE)
    assert line in page("ssd/augment.py")


def test_tutorial_adds_an_augmentation_in_one_file(tmp_path, monkeypatch):
    """The patch of the page applies, and images become gray by its setting only."""
    (patch,) = re.findall(r"^```diff\n(.*?)^```", page("docs/TUTORIAL.md"), re.MULTILINE | re.DOTALL)
    (tmp_path / "ssd").mkdir()
    for name in ("config", "augment"):
        shutil.copy(ROOT / "ssd" / f"{name}.py", tmp_path / "ssd")
    subprocess.run(["git", "apply", "-"], input=patch, cwd=tmp_path, text=True, check=True)
    config, augment = (load_module(f"ssd.{name}", tmp_path, monkeypatch) for name in ("config", "augment"))
    pixels = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = np.array([[0.2, 0.2, 0.6, 0.6]], dtype=np.float32)
    for gray in (0.0, 1.0):
        rng = np.random.default_rng(0)
        _, params = augment.sample_augmentation(config.Config(gray=gray), rng, boxes)
        images, _ = augment.augment_batch(pixels, torch.from_numpy(boxes)[None], augment.AugmentParams.stack([params]))
        assert torch.equal(images[:, 0], images[:, 2]) == bool(gray)


def load_module(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a module from a folder that is not on the path, in place of the one of that name."""
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec((folder / f"{name.replace('.', '/')}.py").read_text(), module.__dict__)
    return module


def test_migration_page_keeps_the_names_of_the_other_projects():
    """The left column is verbatim: a renamed flag of this program must not change it."""
    theirs = re.findall(r"^\| (`[^|]+) \|", page("docs/MIGRATION.md"), re.MULTILINE)
    for text in ("--backbone resnet50", "--checkpoint C", "--mode benchmark-training", "--json-summary F"):
        assert any(text in cell for cell in theirs), text


def test_dummy_workload_runs_by_the_command_of_the_page(tmp_path):
    (command,) = re.findall(r"^\$ (.*)$", page("docs/ADDING_A_BENCHMARK.md"), re.MULTILINE)
    words = command.replace(".venv/bin/python", sys.executable).replace("RUN", str(tmp_path / "run")).split()
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert "ended after epoch" in process.stdout, process.stderr
    assert (tmp_path / "run" / "result_0.txt").exists()


SYSTEM = page("docs/ADDING_A_SYSTEM.md")
TUNE, COPY, DRY_RUN, PREFLIGHT, BENCH = re.findall(r"^\$ (.*)$", SYSTEM, re.MULTILINE)
SMALL = "--device cpu --batch-size 2 --backbone resnet18 --dataset toy --division open --num-workers 0 --precision fp32"


def run(command, clone, data):
    return run_command(command.replace("DATADIR=DIR", f"DATADIR={data}"), clone)


def test_copied_config_file_is_what_a_dry_run_shows(clone, four_image_coco):
    assert run(DRY_RUN, clone, four_image_coco).returncode == 2  # nothing is copied yet
    assert run(COPY, clone, four_image_coco).returncode == 0
    process = run(DRY_RUN, clone, four_image_coco)
    assert process.returncode == 0, process.stderr
    for text in ("114 images", "reference_convergence", "launch:"):
        assert text in process.stdout
    process = run(f"{DRY_RUN} --lr-decay-epochs 3,5", clone, four_image_coco)
    assert process.returncode == 2
    assert "forbids opt_learning_rate_decay_boundary_epochs" in process.stderr
    assert "launch:" not in process.stdout


@pytest.mark.slow
def test_preflight_of_a_copied_config_file_checks_the_machine_and_starts_no_run(clone, four_image_coco):
    run(COPY, clone, four_image_coco)
    process = run(f"{PREFLIGHT} {SMALL} --pretrained-backbone ''", clone, four_image_coco)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.splitlines()[-1].startswith("ready: ")
    assert "STARTING" not in process.stdout
    assert not (clone / "results").exists()
    checks = {line.split("  ")[1] for line in process.stdout.splitlines() if line[:4] in ("pass", "warn", "fail")}
    table = SYSTEM.split("| check | warns if | fails if |")[1].split("\n\n")[0]
    listed = {name for row in table.splitlines()[2:] for name in row.split("|")[1].strip().split(", ")}
    assert checks <= listed
    assert listed - checks == {"COCO 2017", "checksum"}


@pytest.mark.slow
def test_throughput_of_a_copied_config_file_is_measured(clone, four_image_coco):
    run(COPY, clone, four_image_coco)
    few_steps = "--benchmark-warmup 0 --benchmark-input synthetic --compile off"
    process = run(BENCH.replace("20", "1") + f" {SMALL} {few_steps}", clone, four_image_coco)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "img/s" in process.stdout


@pytest.mark.slow
def test_measured_config_file_passes_a_dry_run(clone, four_image_coco):
    command = f"DATADIR=DIR {TUNE.replace('300', '60')} --backbone resnet18 --batch-size 2 --num-workers 0"
    process = run(command, clone, four_image_coco)
    assert process.returncode == 0, process.stdout + process.stderr
    assert (clone / "config_mine.sh").is_file()
    process = run(DRY_RUN, clone, four_image_coco)
    assert process.returncode == 0, process.stderr


def test_every_line_of_the_config_files_is_explained():
    lines = "\n".join(
        path.read_text() for path in ROOT.glob("config_*.sh") if not path.stem.endswith(("_maskrcnn", "_retinanet"))
    )
    explained = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", SYSTEM.split("## Copied")[1].split("## Checked")[0]))
    assert set(re.findall(r"export ([A-Z0-9_]+)=", lines)) == explained - {"PRETRAINED_DIR", "MASKRCNN_"}
