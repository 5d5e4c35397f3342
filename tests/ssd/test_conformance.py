"""Conformance to the MLPerf reference, through the command that users run on a new accelerator."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import commands
from detection.evaluation.conformance import part_name, read_network
from detection.runtime.device import has_native_bf16
from paths import ROOT
from recorded_vectors import failed_results
from ssd import checkpoint_names, conformance
from ssd.conformance import SUITE
from ssd.model import SSD300

CPU = torch.device("cpu")


def compare_only(monkeypatch, *comparisons):
    monkeypatch.setattr(conformance, "SUITE", replace(SUITE, comparisons=comparisons))


# Without a slow one, which tests/perf/test_ssd_baseline.py covers with another implementation.
COMPARISONS = [
    pytest.param(compare, marks=pytest.mark.slow) if compare is conformance.compare_crops else compare
    for compare in SUITE.comparisons
]


@pytest.mark.parametrize("compare", COMPARISONS, ids=part_name)
def test_every_comparison_with_the_reference_passes(golden, compare):
    context = SUITE.load(golden, "cpu", "fp32")
    results = list(compare(context))
    assert results
    assert [result for result in results if not result.passed] == []


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_every_comparison_passes_on_the_accelerator(golden, precision):
    context = SUITE.load(golden, "auto", precision)
    assert context.device.type != "cpu"
    assert failed_results(SUITE, context) == []


def test_builtin_network_is_that_of_the_reference(golden):
    assert conformance.reference_network() == read_network(golden.with_name("ssd_reference_state_dict.json"))


@pytest.mark.parametrize(
    "precision", ["bf16" if has_native_bf16(CPU) else pytest.param("bf16", marks=pytest.mark.slow)]
)
def test_network_in_bf16_is_within_its_tolerance(golden, precision):
    context = SUITE.load(golden, "cpu", precision)
    results = list(SUITE.results(conformance.compare_network, context))
    assert [result for result in results if not result.passed] == []
    assert max(result.tolerance for result in results) < 0.7  # the simulation agrees with the reference


def test_failed_comparison_is_reported_with_exit_status_1(golden, tmp_path, capsys, monkeypatch):
    vectors = dict(np.load(golden))
    vectors["default_boxes_xyxy"] = vectors["default_boxes_xyxy"] + np.float32(1e-3)
    np.savez(tmp_path / "changed.npz", **vectors)
    compare_only(monkeypatch, conformance.compare_anchors)
    assert commands.ssd("conformance", str(tmp_path / "changed.npz"), "--device", "cpu") == 1
    output = capsys.readouterr().out
    assert "anchors xyxy" in output
    assert "FAIL" in output
    assert "1 of 2 comparisons passed" in output


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "not a file of conformance vectors"), (b"PK\x03\x04", "not a file"), ({}, "holds no vectors")],
)
def test_unusable_file_is_rejected_with_exit_status_2(tmp_path, capsys, content, message):
    path = tmp_path / "vectors.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **content)
    assert commands.ssd("conformance", str(path), "--device", "cpu") == 2
    assert message in capsys.readouterr().err


def test_absent_vectors_are_reported_and_the_other_parts_compared(golden, tmp_path, capsys, monkeypatch):
    compare_only(monkeypatch, conformance.compare_losses, conformance.compare_anchors)
    vectors = {name: value for name, value in np.load(golden).items() if not name.startswith("loss")}
    np.savez(tmp_path / "part.npz", **vectors)
    assert commands.ssd("conformance", tmp_path / "part.npz", "--device", "cpu") == 0
    shown = capsys.readouterr().out
    assert "losses " in shown
    assert "absent: the file has no vector" in shown
    assert "comparisons passed, 1 parts absent" in shown


def test_conversion_to_the_reference_and_back_is_lossless():
    model = SSD300()
    reference_state = checkpoint_names.to_reference(model.state_dict())
    state = checkpoint_names.from_reference(reference_state)
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_network_has_the_parameter_counts_of_the_reference():
    model = SSD300()
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.backbone, model.extras, model.heads)]
    assert counts == [8_170_304, 3_574_400, 8_227_830]


def test_command_reports_an_invalid_device_without_traceback(golden):
    command = [sys.executable, "-m", "ssd", "conformance", str(golden), "--device", "nonsense"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert result.returncode == 2
    assert "error:" in result.stderr
    assert "Traceback" not in result.stderr
