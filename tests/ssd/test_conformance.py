"""The numbers of the MLPerf reference, through the command that an engineer runs on a new accelerator."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from paths import ROOT
from ssd import checkpoint_names, conformance
from ssd.model import SSD300


@pytest.mark.parametrize("parts", conformance.PARTS, ids=lambda parts: parts.__name__)
def test_every_part_of_the_reference_is_reproduced(golden, parts):
    bench = conformance.open_bench(golden, "cpu", "fp32")
    results = list(parts(bench))
    assert results
    assert [part for part in results if not part.agrees] == []


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_the_accelerator_reproduces_the_reference(golden, precision):
    bench = conformance.open_bench(golden, "auto", precision)
    assert bench.device.type != "cpu"
    wrong = [part for parts in conformance.PARTS for part in parts(bench) if not part.agrees]
    assert wrong == []


def test_the_builtin_names_are_those_of_the_reference(golden):
    content = json.loads(golden.with_name("ssd_reference_state_dict.json").read_text())
    assert checkpoint_names.tensor_kinds() == [
        (name, tuple(shape), kind) for name, shape, kind in content["state_dict"]
    ]


def test_the_network_works_in_bf16_within_its_tolerance(golden):
    bench = conformance.open_bench(golden, "cpu", "bf16")
    assert [part for part in conformance.network_parts(bench) if not part.agrees] == []


def test_a_wrong_vector_is_told_and_exits_1(golden, tmp_path, capsys, monkeypatch):
    vectors = dict(np.load(golden))
    vectors["default_boxes_xyxy"] = vectors["default_boxes_xyxy"] + np.float32(1e-3)
    np.savez(tmp_path / "changed.npz", **vectors)
    monkeypatch.setattr(conformance, "PARTS", (conformance.anchor_parts,))
    assert conformance.main([str(tmp_path / "changed.npz"), "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "anchors xyxy" in shown
    assert "WRONG" in shown
    assert "1 of 2 comparisons agree" in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "not a file of conformance vectors"), (b"PK\x03\x04", "not a file"), ({}, "is missing")],
)
def test_an_unusable_file_exits_2(tmp_path, capsys, content, message):
    path = tmp_path / "vectors.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **content)
    assert conformance.main([str(path), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_goes_to_the_reference_and_back_unchanged():
    model = SSD300()
    there = checkpoint_names.to_reference(model.state_dict())
    back = checkpoint_names.from_reference(there)
    assert list(back) == list(model.state_dict())
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_the_network_has_the_parameters_of_the_benchmark():
    model = SSD300()
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.backbone, model.extras, model.heads)]
    assert counts == [8_170_304, 3_574_400, 8_227_830]


def test_the_command_runs_by_itself(golden):
    command = [sys.executable, "-m", "ssd.conformance", str(golden), "--device", "nonsense"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert result.returncode == 2
    assert "error:" in result.stderr
    assert "Traceback" not in result.stderr
