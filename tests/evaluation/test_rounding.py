"""Simulated precisions round as torch's autocast, and tolerances of the conformance tests follow from them."""

import copy

import pytest
import torch
from torch import nn

from detection.evaluation import conformance
from detection.evaluation.conformance import FLOAT32_ERROR, ROUNDING_MARGIN, Comparison, ConformanceContext
from detection.evaluation.rounding import SimulatedPrecision, round_to
from detection.runtime.device import select_precision

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
    assert torch.equal(round_to(values, name), expected)


def test_tolerances_of_a_network_follow_from_its_simulated_errors():
    def compare_network(context):
        is_simulated = isinstance(context.precision, SimulatedPrecision)
        assert (context.dtype == torch.float64) == is_simulated
        errors = (0.01, 0.04) if is_simulated else (0.07, 0.09)
        for error in errors:
            yield Comparison("output", error, 1e-4)
        yield Comparison("count", 0 if is_simulated else 1, 0)

    def compare_targets(context):
        yield Comparison("targets", 0.5, 1e-4)

    suite = conformance.ConformanceSuite("", (compare_network, compare_targets), None, (compare_network,))
    context = ConformanceContext(conformance.Vectors(), None, CPU, select_precision("bf16", CPU))
    tolerance = ROUNDING_MARGIN * 0.04 + FLOAT32_ERROR
    results = list(suite.results(compare_network, context))
    assert [result.tolerance for result in results] == [tolerance, tolerance, 0]
    assert [result.passed for result in results] == [True, False, False]
    assert [result.tolerance for result in suite.results(compare_targets, context)] == [1e-4]
    exact = ConformanceContext(conformance.Vectors(), None, CPU, select_precision("fp32", CPU))
    assert [result.tolerance for result in suite.results(compare_network, exact)] == [1e-4, 1e-4, 0]
