"""Fixtures shared by several test files."""

import gc
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from paths import ROOT

# Under xdist one process per core, where more threads would wait for each other. Otherwise two threads.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


def pytest_collection_finish() -> None:
    """Exclude imported objects, about a million, from garbage collection."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # otherwise extensions report leaks at exit


@pytest.fixture(scope="session")
def golden() -> Path:
    """Conformance vectors of the MLPerf reference."""
    return ROOT / "tests/golden/ssd/ssd_reference.npz"


@pytest.fixture(scope="session")
def four_image_coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toy data set of 4 training and 2 evaluation images, all with boxes."""
    from detection.synthetic import toy

    folder = tmp_path_factory.mktemp("four_image_coco") / "data"
    toy.generate(folder, toy.ToySpec(train_images=4, val_images=2, seed=1))
    return folder


@pytest.fixture(scope="session")
def small_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toy data set of 24 training and 8 evaluation images."""
    from detection.synthetic import toy

    folder = tmp_path_factory.mktemp("toy") / "data"
    toy.generate(folder, toy.ToySpec(train_images=24, val_images=8, seed=3))
    return folder


@pytest.fixture
def toy_copy(small_toy: Path, tmp_path: Path) -> Path:
    """Copy of `small_toy` that a test may modify."""
    return shutil.copytree(small_toy, tmp_path / "data")


@pytest.fixture
def python_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the loops of exported networks in Python. Outside of an export, torch takes seconds to trace them."""
    from detection.nn import traceable_nms

    def run_loop(cond: Any, body: Any, values: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        while cond(*values):
            values = body(*values)
        return values

    monkeypatch.setattr(traceable_nms, "while_loop", run_loop)
