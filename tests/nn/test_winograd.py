"""Winograd's algorithm computes what direct convolution computes, with little more rounding error."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detection.engine.initialization import build_state
from detection.nn import winograd
from detection.nn.winograd import WinogradConv2d, convolve, convolve_levels, use_winograd
from detection.runtime.device import CAN_COMPILE
from detection.runtime.distributed import DistContext
from retinanet.config import load
from retinanet.model import make_model

CPU = torch.device("cpu")
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture(autouse=True)
def no_minimum_size(monkeypatch):
    monkeypatch.setattr(winograd, "MIN_TILES", 1)


def make_inputs(batch, in_channels, out_channels, sizes_hw, layout=torch.channels_last, *, bias=True):
    torch.manual_seed(0)
    maps = [torch.randn(batch, in_channels, *size).relu() for size in sizes_hw]  # as after an activation
    weight = torch.randn(out_channels, in_channels, 3, 3) / in_channels**0.5
    tensors = [one.contiguous(memory_format=layout).requires_grad_() for one in (*maps, weight)]
    return tensors[:-1], tensors[-1], torch.randn(out_channels).requires_grad_() if bias else None


def results_and_gradients(function, maps, weight, bias, dtype):
    """Return the results, and the gradients of all inputs, of a convolution of copies in a data type."""
    inputs = [one.detach().to(dtype).requires_grad_() for one in (*maps, weight, *([] if bias is None else [bias]))]
    results = function(inputs[: len(maps)], inputs[len(maps)], None if bias is None else inputs[-1])
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(one.shape, generator=generator).to(dtype) for one in results]
    return [*results, *torch.autograd.grad(results, inputs, factors)]


def direct(maps, weight, bias):
    return [F.conv2d(one, weight, bias, padding=1) for one in maps]


def relative_errors(actual, expected):
    return [
        float((one.detach().double() - exact.detach()).abs().max() / exact.detach().abs().max())
        for one, exact in zip(actual, expected, strict=True)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("batch", "in_channels", "out_channels", "sizes_hw"),
    [
        (1, 1, 1, [(1, 1)]),
        (2, 3, 5, [(4, 4)]),
        (3, 16, 8, [(5, 7), (8, 12), (1, 3)]),
        (2, 128, 160, [(19, 20), (10, 10), (3, 2)]),
    ],
)
def test_equals_direct_convolution(batch, in_channels, out_channels, sizes_hw, bias, layout):
    inputs = make_inputs(batch, in_channels, out_channels, sizes_hw, layout, bias=bias)
    exact = results_and_gradients(direct, *inputs, torch.float64)
    actual = results_and_gradients(convolve, *inputs, torch.float32)
    assert max(relative_errors(actual, exact)) < 1e-5
    for one in actual[: 2 * len(sizes_hw) + 1]:  # results, gradients of the maps and of the weight
        assert one.is_contiguous(memory_format=layout)


def test_rounding_error_is_small():
    """Direct convolution has 4e-7 to 7e-7; with the points 0, 1, -1, 2, -2 the gradients have 2.3e-6."""
    inputs = make_inputs(2, 128, 128, [(38, 38)])
    exact = results_and_gradients(direct, *inputs, torch.float64)
    actual = results_and_gradients(convolve, *inputs, torch.float32)
    for one, expected in zip(actual, exact, strict=True):
        assert (one.double() - expected).norm() < 2e-6 * expected.norm()


def test_blocks_change_nothing_but_rounding(monkeypatch):
    inputs = make_inputs(5, 8, 24, [(9, 6), (4, 4)])
    whole = results_and_gradients(convolve, *inputs, torch.float32)
    shapes = [one.shape for one in inputs[0]]
    monkeypatch.setattr(winograd, "BLOCK_BYTES", 2**14)
    assert len(winograd.split_images(shapes)) == 3
    assert winograd.choose_block_size(shapes, 24) == 8
    blocks = results_and_gradients(convolve, *inputs, torch.float32)
    assert max(relative_errors(blocks, [one.double() for one in whole])) < 5e-6


@pytest.mark.parametrize("frozen", ["weight", "bias", "maps"])
def test_frozen_inputs_have_no_gradient(frozen):
    maps, weight, bias = make_inputs(2, 4, 6, [(8, 8), (4, 4)])
    for tensor in {"weight": [weight], "bias": [bias], "maps": maps}[frozen]:
        tensor.requires_grad_(False)
    trained = [one for one in (*maps, weight, bias) if one.requires_grad]
    gradients = [
        torch.autograd.grad(sum(one.sum() for one in f(maps, weight, bias)), trained) for f in (convolve, direct)
    ]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_results_can_be_changed_in_place():
    maps, weight, bias = make_inputs(1, 4, 4, [(5, 5), (4, 4)])
    results = [F.relu(one, inplace=True) for one in convolve(maps, weight, bias)]
    sum(one.sum() for one in results).backward()
    assert weight.grad is not None


def test_small_or_double_inputs_use_direct_convolution(monkeypatch):
    monkeypatch.setattr(winograd, "MIN_TILES", 64)
    maps, weight, bias = make_inputs(1, 8, 8, [(28, 32)])  # 56 tiles
    torch.testing.assert_close(convolve(maps, weight, bias), direct(maps, weight, bias), rtol=0, atol=0)
    doubles = [one.double() for one in (*maps, weight, bias)]
    assert convolve(doubles[:1], *doubles[1:])[0].dtype == torch.float64


def test_selects_wide_3x3_convolutions_of_stride_1():
    wide = nn.Conv2d(128, 128, 3, padding=1)
    others = [
        nn.Conv2d(128, 128, 1),
        nn.Conv2d(128, 128, 3),
        nn.Conv2d(128, 64, 3, padding=1),
        nn.Conv2d(128, 128, 3, padding=1, stride=2),
        nn.Conv2d(128, 128, 3, padding=2, dilation=2),
        nn.Conv2d(128, 128, 3, padding=1, groups=4),
        nn.Conv2d(128, 128, 3, padding=1, padding_mode="reflect"),
    ]
    model = nn.Sequential(wide, *others)
    names = list(model.state_dict())
    use_winograd(model)
    assert isinstance(wide, WinogradConv2d)
    assert not any(isinstance(other, WinogradConv2d) for other in others)
    assert list(model.state_dict()) == names


def test_levels_of_an_ordinary_convolution():
    maps, *_ = make_inputs(1, 4, 4, [(5, 5), (4, 4)])
    conv = nn.Conv2d(4, 6, 3, padding=1)
    for actual, one in zip(convolve_levels(conv, maps), maps, strict=True):
        torch.testing.assert_close(actual, conv(one), rtol=0, atol=0)


def test_retinanet_predicts_the_same():
    config = load(
        ["--backbone", "resnet18", "--num-classes", "12", "--image-size", "128", "--device", "cpu"], {}
    ).config
    torch.manual_seed(0)
    model = make_model(config).eval()
    converted = copy.deepcopy(model)
    use_winograd(converted)
    assert sum(isinstance(module, WinogradConv2d) for module in converted.modules()) > 10
    images = torch.randn(2, 3, 128, 128)
    with torch.inference_mode():
        for actual, expected in zip(converted(images), model(images), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "is_used"),
    [
        (["--precision", "fp32"], True),
        (["--precision", "bf16"], False),
        pytest.param(
            ["--compile", "on"], False, marks=pytest.mark.skipif(not CAN_COMPILE, reason="--compile needs torch 2.6")
        ),
    ],
)
def test_a_run_uses_it_in_float32_on_a_cpu_in_eager_mode(flags, is_used):
    workload = SimpleNamespace(model=nn.Sequential(nn.Conv2d(128, 128, 3, padding=1)), fixed_input_size=True)
    config = load(["--device", "cpu", *flags], {}).config
    state = build_state(workload, config, DistContext(0, 1, CPU))
    assert any(isinstance(module, WinogradConv2d) for module in state.model.modules()) == is_used
