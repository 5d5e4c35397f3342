"""Memory layout of the network, and the precision of batch norm that depends on it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from detection.engine.initialization import build_state
from detection.runtime.device import Precision, select_memory_format
from detection.runtime.distributed import DistContext
from ssd.config import Config
from ssd.model import Backbone

CPU = torch.device("cpu")


def gradient_error(channels_last: str) -> float:
    """Return the largest relative error of a parameter's gradient in fp32, against double precision."""
    torch.manual_seed(0)
    backbone = Backbone("resnet18")
    backbone.layer2 = backbone.layer3 = nn.Identity()
    exact = copy.deepcopy(backbone).double()
    config = Config(device="cpu", precision="fp32", channels_last=channels_last)
    state = build_state(SimpleNamespace(model=backbone, fixed_input_size=True), config, DistContext(0, 1, CPU))
    images = torch.rand(1, 3, 96, 96).contiguous(memory_format=torch.channels_last)  # as the data workers' batches
    factors = torch.randn(1, 64, 24, 24)
    (state.model(images) * factors).sum().backward()
    (exact(images.double()) * factors.double()).sum().backward()
    pairs = zip(state.model.parameters(), exact.parameters(), strict=True)
    return max(float((p.grad.double() - e.grad).norm() / e.grad.norm()) for p, e in pairs)


def test_fp32_gradients_on_a_cpu_are_near_double_precision():
    assert gradient_error("auto") < 1e-4  # channels-last reaches 4e-3, depending on the number of threads


@pytest.mark.parametrize(
    ("device", "dtype", "trains_batch_norm", "expected"),
    [
        ("cpu", None, True, torch.contiguous_format),
        ("cpu", None, False, torch.channels_last),
        ("cpu", torch.bfloat16, True, torch.channels_last),
        ("cuda", None, True, torch.channels_last),
    ],
)
def test_auto_is_contiguous_only_for_trained_batch_norm_in_fp32_on_a_cpu(device, dtype, trains_batch_norm, expected):
    device, precision = torch.device(device), Precision("", dtype)
    assert select_memory_format("auto", precision, device, trains_batch_norm=trains_batch_norm) == expected
    for choice, chosen in (("on", torch.channels_last), ("off", torch.contiguous_format)):
        assert select_memory_format(choice, precision, device, trains_batch_norm=trains_batch_norm) == chosen


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_network_computes_in_the_layout_of_its_weights(layout):
    backbone = Backbone("resnet18").to(memory_format=layout)
    seen = []
    backbone.bn1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    backbone.layer1 = backbone.layer2 = backbone.layer3 = nn.Identity()
    for images in (torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)):
        backbone(images)
    assert all(features.is_contiguous(memory_format=layout) for features in seen)
