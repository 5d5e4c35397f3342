"""Errors of simulated rounding are recorded once, next to the vectors, and used by later runs."""

from argparse import Namespace

import numpy as np
import pytest

from detection.config.settings import InputError
from detection.evaluation.conformance import (
    NUM_SIMULATIONS,
    ROUNDING_MARGIN,
    Comparison,
    ConformanceSuite,
    ReferenceNetwork,
)
from detection.evaluation.rounding import SimulatedPrecision
from detection.evaluation.rounding_errors import read_errors, record_errors, recorded_path
from maskrcnn import conformance as maskrcnn
from paths import ROOT
from retinanet import conformance as retinanet
from ssd import conformance as ssd


@pytest.fixture
def vectors(tmp_path):
    path = tmp_path / "vectors.npz"
    np.savez(path, numbers=np.arange(3))
    return path


def test_errors_of_several_precisions_are_kept(vectors):
    assert read_errors(vectors) == {}
    record_errors(vectors, "bf16", {"output": 0.0123456, "loss": 1e-7})
    record_errors(vectors, "tf32", {"output": 0.001})
    record_errors(vectors, "bf16", {"output": 0.02})
    assert read_errors(vectors) == {"bf16": {"output": 0.02}, "tf32": {"output": 0.001}}


def test_errors_of_other_vectors_are_not_used(vectors):
    record_errors(vectors, "bf16", {"output": 0.01})
    np.savez(vectors, numbers=np.arange(4))
    assert read_errors(vectors) == {}
    record_errors(vectors, "tf32", {"output": 0.01})
    assert read_errors(vectors) == {"tf32": {"output": 0.01}}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"vectors_sha256": "", "precisions": {"bf16": {"output": "?"}}}'])
def test_unusable_file_is_rejected(vectors, text):
    recorded_path(vectors).write_text(text)
    with pytest.raises(InputError, match="not the errors of rounding"):
        read_errors(vectors)


def test_command_records_the_errors_that_later_runs_use(vectors, capsys):
    simulations = []

    def compare_network(context):
        is_simulated = isinstance(context.precision, SimulatedPrecision)
        simulations.extend([context.precision] * is_simulated)
        yield Comparison("output", 0.01 if is_simulated else 0.02, 1e-4)

    def compare_absent(context):
        yield Comparison("absent", context.scalar("other"), 1e-4)

    comparisons = (compare_network, compare_absent)
    suite = ConformanceSuite("", comparisons, lambda: ReferenceNetwork([], []), network_comparisons=comparisons)
    arguments = Namespace(file=vectors, device="cpu", precision="bf16", record_rounding=True)
    assert suite.run(arguments) == 0
    assert f"Wrote {recorded_path(vectors)}" in capsys.readouterr().out
    assert len(simulations) == NUM_SIMULATIONS

    arguments.record_rounding = False
    assert suite.run(arguments) == 0
    assert len(simulations) == NUM_SIMULATIONS
    assert f"tolerance  {1e-4 + ROUNDING_MARGIN * 0.01:.1e}" in capsys.readouterr().out

    arguments.precision = "fp16"
    assert suite.run(arguments) == 0
    assert "fp16 is simulated first: its errors are not recorded for these vectors" in capsys.readouterr().out
    assert len(simulations) == 2 * NUM_SIMULATIONS


def test_vectors_of_another_network_leave_no_record(vectors):
    arguments = Namespace(file=vectors, device="cpu", precision="bf16", record_rounding=True)
    with pytest.raises(InputError, match="holds no vectors of SSD300"):
        ssd.SUITE.run(arguments)
    assert not recorded_path(vectors).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workload", "suite"), [("ssd", ssd.SUITE), ("maskrcnn", maskrcnn.SUITE), ("retinanet", retinanet.SUITE)]
)
def test_recorded_errors_are_those_of_the_simulation(workload, suite):
    context = suite.load(ROOT / "tests/golden" / workload / f"{workload}_reference.npz", "cpu", "bf16")
    first = {
        result.name: result.error
        for compare in suite.network_comparisons
        for result in compare(next(context.simulated()))
    }
    assert first.keys() == context.rounding_errors.keys()
    # The recorded ones are the largest of several simulations, on another machine.
    assert {name: error for name, error in first.items() if error > 1.1 * context.rounding_errors[name] + 1e-6} == {}
