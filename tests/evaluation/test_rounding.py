"""Simulated precisions round as torch's autocast, and tolerances of the conformance tests follow from them."""

import copy

import pytest
import torch
from torch import nn

from detection.evaluation import conformance
from detection.evaluation.conformance import (
    MAX_UNMATCHED,
    NUM_SIMULATIONS,
    ROUNDING_MARGIN,
    Comparison,
    ConformanceContext,
)
from detection.evaluation.rounding import SimulatedPrecision, round_to
from detection.runtime.device import select_precision
from detection.runtime.threads import limit_threads

CPU = torch.device("cpu")


def gradients_and_output(model, images, precision):
    model.zero_grad()
    with precision.autocast(CPU):
        output = model(images)
    output.float().square().sum().backward()
    return [output.detach().double()] + [parameter.grad.double() for parameter in model.parameters()]


def relative_errors(actual, expected):
    return [float((a - e).norm() / e.norm()) for a, e in zip(actual, expected, strict=True)]


def test_simulated_bf16_has_the_errors_of_autocast():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)) for _ in range(4)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16 * 16, 10))
    images = torch.randn(4, 8, 16, 16)
    exact = copy.deepcopy(model).double()
    expected = gradients_and_output(exact, images.double(), select_precision("fp32", CPU))
    simulated = gradients_and_output(exact, images.double(), SimulatedPrecision("bf16"))
    actual = gradients_and_output(model, images, select_precision("bf16", CPU))
    for simulated_error, actual_error in zip(
        relative_errors(simulated, expected), relative_errors(actual, expected), strict=True
    ):
        assert 0.3 * actual_error < simulated_error < 3 * actual_error


@pytest.mark.parametrize(("name", "bits"), [("bf16", 8), ("fp16", 11), ("tf32", 11)])
def test_values_are_rounded_to_the_bits_of_a_precision(name, bits):
    step = 2.0 ** (1 - bits)
    values = torch.tensor([1.0, 1 + step, 1 + 0.4 * step, 1 + 0.6 * step, -1 - 0.6 * step], dtype=torch.float64)
    expected = torch.tensor([1.0, 1 + step, 1.0, 1 + step, -1 - step], dtype=torch.float64)
    assert torch.equal(round_to(values, SimulatedPrecision(name)), expected)
    images, rounded = (tensor.repeat(2, 3, 4, 1).to(memory_format=torch.channels_last) for tensor in (values, expected))
    assert torch.equal(round_to(images, SimulatedPrecision(name)), rounded)


@pytest.mark.parametrize("name", ["bf16", "fp16", "tf32"])
def test_another_spacing_changes_the_errors_but_not_their_size(name):
    values = torch.randn(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = {}
    for spacing in (1.0, 2**0.5):
        precision = SimulatedPrecision(name, spacing=spacing)
        rounded = round_to(values, precision)
        assert torch.equal(round_to(rounded, precision), rounded)
        errors[spacing] = rounded / values - 1
    plain, spaced = errors.values()
    assert 0.9 < float(spaced.norm() / plain.norm()) < 1.1
    assert abs(float((plain * spaced).sum() / (plain.norm() * spaced.norm()))) < 0.05


def test_exact_values_stay_exact_with_another_spacing():
    values = torch.tensor([0.0, 0.25, 1.0, -3.0, 128.0], dtype=torch.float64)
    assert torch.equal(round_to(values, SimulatedPrecision("bf16", spacing=1.3)), values)


def test_constants_are_not_rounded():
    with SimulatedPrecision("bf16").autocast(CPU):
        assert float(torch.tensor([0.1], dtype=torch.float64).to(torch.float32)) == pytest.approx(0.1, rel=1e-7)


def test_results_of_float32_operands_are_rounded_only_if_converted():
    values = torch.full((4,), 1 + 2**-12, dtype=torch.float64)
    with SimulatedPrecision("bf16").autocast(CPU):
        assert torch.equal((values + 0).float(), torch.ones(4))
        in_float32 = values + torch.zeros(4)
        assert in_float32.dtype == torch.float32
        assert torch.equal(in_float32 * 1, values.float())
        assert torch.equal(in_float32.to(values.dtype), torch.ones(4, dtype=torch.float64))


def test_tolerances_of_a_network_follow_from_its_simulated_errors():
    spacings = []

    def compare_network(context):
        is_simulated = isinstance(context.precision, SimulatedPrecision)
        assert (context.dtype == torch.float64) == is_simulated
        if is_simulated:
            spacings.append(context.precision.spacing)
        # The largest of all simulations is that of the last one.
        yield Comparison("output", 0.01 * len(spacings) if is_simulated else 0.2, 1e-4)
        yield Comparison("loss", 0.001 if is_simulated else 0.2, 1e-4)
        yield Comparison("unmatched", 0.3 if is_simulated else 0.4, 0.03, MAX_UNMATCHED)
        yield Comparison("overflow", float("inf") if is_simulated else 1, 0.03)
        yield Comparison("count", 0 if is_simulated else 1, 0)

    def compare_targets(context):
        yield Comparison("targets", 0.5, 1e-4)

    suite = conformance.ConformanceSuite("", (compare_network, compare_targets), None, (compare_network,))
    context = ConformanceContext(conformance.Vectors(), None, CPU, select_precision("bf16", CPU))
    results = list(suite.results(compare_network, context))
    assert len(set(spacings)) == NUM_SIMULATIONS
    assert [result.tolerance for result in results] == pytest.approx(
        [
            1e-4 + ROUNDING_MARGIN * 0.01 * NUM_SIMULATIONS,
            1e-4 + ROUNDING_MARGIN * 0.001,
            MAX_UNMATCHED,
            float("inf"),
            0,
        ]
    )
    assert [result.passed for result in results] == [True, False, True, False, False]
    assert [result.tolerance for result in suite.results(compare_targets, context)] == [1e-4]
    exact = ConformanceContext(conformance.Vectors(), None, CPU, select_precision("fp32", CPU))
    assert [result.tolerance for result in suite.results(compare_network, exact)] == [1e-4, 1e-4, 0.03, 0.03, 0]


def test_a_device_computes_with_one_thread_and_the_simulation_with_all():
    threads = []

    def compare_network(context):
        threads.append((isinstance(context.precision, SimulatedPrecision), torch.get_num_threads()))
        yield Comparison("output", 0.0, 1e-4)

    suite = conformance.ConformanceSuite("", (compare_network,), None, (compare_network,))
    context = ConformanceContext(conformance.Vectors(), None, CPU, select_precision("bf16", CPU))
    with limit_threads(2):
        assert len(list(suite.results(compare_network, context))) == 1
        assert torch.get_num_threads() == 2
    assert set(threads) == {(True, 2), (False, 1)}
