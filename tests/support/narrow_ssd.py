"""SSD300 with a sixteenth of the channels: the tensors have the names of the real ones, at a hundredth of the cost.

Run as a program, it trains as `python -m ssd train` does. COMPILE_BACKEND names the backend of --compile on.
"""

import os
import sys
from functools import partial

import pytest
import torch
import torchvision
from torch import nn

from detection.engine import entrypoint
from perf.ssd import baseline
from ssd import model, train

NARROWER = 16
CHANNELS, EXTRA_BLOCKS, RESNET = model.feature_map_channels, model.EXTRA_BLOCKS, torchvision.models.get_model


def make_narrow(patch: pytest.MonkeyPatch) -> None:
    """Make every network that is built from now on narrow."""
    extras = tuple((channels // NARROWER, stride, padding) for channels, stride, padding in EXTRA_BLOCKS)
    patch.setattr(model, "EXTRA_BLOCKS", extras)
    for module in (model, baseline):
        patch.setattr(module, "feature_map_channels", lambda name: tuple(n // NARROWER for n in CHANNELS(name)))
    patch.setattr(torchvision.models, "get_model", narrow_resnet)


def narrow_resnet(name: str, weights: None = None) -> nn.Module:
    resnet = RESNET(name, weights=weights)
    for module in list(resnet.modules()):
        for child_name, child in module.named_children():
            if isinstance(child, nn.Conv2d):
                inputs = child.in_channels if child.in_channels == 3 else child.in_channels // NARROWER
                shape = (inputs, child.out_channels // NARROWER, child.kernel_size, child.stride, child.padding)
                setattr(module, child_name, nn.Conv2d(*shape, bias=False))
            elif isinstance(child, nn.BatchNorm2d):
                setattr(module, child_name, nn.BatchNorm2d(child.num_features // NARROWER))
    return resnet


if __name__ == "__main__":
    make_narrow(pytest.MonkeyPatch())
    if backend := os.environ.get("COMPILE_BACKEND"):
        torch.compile = partial(torch.compile, backend=backend)
    entrypoint.hard_exit(train.main(sys.argv[1:]))
