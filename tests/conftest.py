"""What several test files share: where the real data are, and small models and pictures."""

import gc
import os
import shutil
from pathlib import Path

import pytest
import torch

from paths import shared

# A process for each core: more threads would wait for each other. Alone, two do.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


def pytest_collection_finish() -> None:
    """Keep what was imported out of every collection of garbage: there are a million objects of it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or extensions complain of what is left at the end


@pytest.fixture(scope="session")
def golden() -> Path:
    """The conformance vectors of the MLPerf reference."""
    return shared("golden/ssd_reference.npz")


@pytest.fixture(scope="session")
def handful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn data set of 4 training and 2 evaluation pictures, all with boxes."""
    from detection.synthetic import toy

    folder = tmp_path_factory.mktemp("handful") / "data"
    toy.draw(folder, toy.Drawing(train_images=4, val_images=2, seed=1))
    return folder


@pytest.fixture(scope="session")
def tiny_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn data set of 24 training and 8 evaluation pictures."""
    from detection.synthetic import toy

    folder = tmp_path_factory.mktemp("toy") / "data"
    toy.draw(folder, toy.Drawing(train_images=24, val_images=8, seed=3))
    return folder


@pytest.fixture
def pictures(tiny_toy: Path, tmp_path: Path) -> Path:
    """A copy of the drawn data that a test may destroy."""
    return shutil.copytree(tiny_toy, tmp_path / "data")
