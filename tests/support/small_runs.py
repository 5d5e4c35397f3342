"""Runs of a small network on four images, as fixtures and tests that the workloads share."""

import io
import json
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import processes
from config_files import set_only
from detection import run_dir


def set_environment(monkeypatch: pytest.MonkeyPatch, prefix: str, settings: Mapping[str, str], data_dir: Path) -> None:
    """Set the environment of a run with these settings on a data set."""
    set_only(monkeypatch, {f"{prefix}_{name}": value for name, value in settings.items()} | {"DATADIR": data_dir})


def make_fixtures(prefix: str, settings: Mapping[str, str], main: Callable[[list[str]], int]) -> tuple[Any, Any]:
    """Return the fixtures `uninterrupted_run`, whose folder tests must not change, and `run`."""

    @pytest.fixture(scope="module")
    def uninterrupted_run(four_image_coco, tmp_path_factory):
        """Run folder and output of an uninterrupted run."""
        folder, output = tmp_path_factory.mktemp("uninterrupted_run") / "run", io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(output):
            set_environment(patch, prefix, settings, four_image_coco)
            patch.setenv("RUN_DIR", str(folder))
            assert main([]) == 0
        return folder, output.getvalue()

    @pytest.fixture
    def run(four_image_coco, tmp_path, monkeypatch):
        """Function that trains in a named folder and returns exit status and folder."""
        set_environment(monkeypatch, prefix, settings, four_image_coco)

        def train(*flags, name="run"):
            monkeypatch.setenv("RUN_DIR", str(tmp_path / name))
            return main(list(flags)), tmp_path / name

        return train

    return uninterrupted_run, run


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of the latest checkpoint."""
    weights: dict[str, Tensor] = torch.load(run_dir.list_checkpoints(folder)[-1].path, weights_only=True)["model"]
    return weights


class SharedTests:
    """Tests of a workload's modes, for a module with the fixtures."""

    def test_checkpoint_evaluates_to_the_same_metrics(self, uninterrupted_run, run, tmp_path):
        folder, _ = uninterrupted_run
        checkpoint = run_dir.list_checkpoints(folder)[-1].path
        summary = tmp_path / "summary.json"
        flags = ("--mode", "evaluate", "--weights", str(checkpoint), "--summary-json", str(summary))
        assert run(*flags, name="evaluation")[0] == 0
        expected = processes.metrics(folder, "evaluation")[0]["metrics"]
        assert json.loads(summary.read_text())["metrics"] == expected

    @pytest.mark.parametrize("mode", ["bench-train", "bench-infer"])
    def test_benchmark_modes_report_throughput(self, run, tmp_path, mode):
        summary = tmp_path / "summary.json"
        flags = ("--mode", mode, "--benchmark-steps", "2", "--benchmark-warmup", "0", "--summary-json", str(summary))
        assert run(*flags)[0] == 0
        results = json.loads(summary.read_text())["results"]
        assert [result["input"] for result in results] == ["real", "synthetic"]
        assert all(result["images_per_s"]["median"] > 0 for result in results)
