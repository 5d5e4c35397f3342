"""A clone of the scripts, and one small run in it that the tests of the pages share."""

from pathlib import Path

import pytest

from script_clone import FLAGS, Run, make_clone, run_command


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    return make_clone(tmp_path)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, four_image_coco: Path) -> Run:
    """One epoch of SSD300 on four images, started by the README's command with smaller settings."""
    clone = make_clone(tmp_path_factory.mktemp("clone"))
    process = run_command(f"./run_and_time.sh --backbone resnet18 {FLAGS}", clone, DATADIR=str(four_image_coco))
    assert process.returncode == 0, process.stdout + process.stderr
    (folder,) = (clone / "results/toy/ssd").iterdir()
    return Run(clone, folder, process.stdout)
