"""Tensor names and layouts of checkpoints: conversion from and to the MLPerf reference, and from SSD300 v1.1.

Both have separate convolutions for boxes and classes on each map. For anchor k of the n anchors of a cell, their
channels are coordinate·n + k and class·n + k. Ours is one fused head with channels k·(4 + K) + {4 deltas, K logits}.
The order of the anchors is the same in all three.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ssd.anchors import ANCHORS_PER_CELL

BACKBONE_PREFIXES = {
    "model.layer1.0.": "backbone.conv1.",
    "model.layer1.1.": "backbone.bn1.",
    "model.layer1.4.": "backbone.layer1.",
    "model.layer1.5.": "backbone.layer2.",
    "model.layer2.0.": "backbone.layer3.",
}
EXTRA_PREFIXES = {
    f"additional_blocks.{i}.{theirs}.": f"extras.{i}.{ours}."
    for i in range(5)
    for theirs, ours in ((0, "conv1"), (2, "conv2"))
}
MLPERF_PREFIXES = BACKBONE_PREFIXES | EXTRA_PREFIXES
SSD_V1_1_PREFIXES = {
    f"feature_extractor.feature_extractor.{theirs}.": f"backbone.{ours}."
    for theirs, ours in ((0, "conv1"), (1, "bn1"), (4, "layer1"), (5, "layer2"), (6, "layer3"))
} | {
    f"additional_blocks.{i}.{theirs}.": f"extras.{i}.{ours}."
    for i in range(5)
    for theirs, ours in ((0, "conv1"), (1, "bn1"), (3, "conv2"), (4, "bn2"))
}


def replace_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    """Replace the prefix of a tensor's name by the table. Raise KeyError if no prefix fits."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise KeyError(name)


def to_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert our state dict to the MLPerf reference's names, shapes and order."""
    prefixes = {ours: theirs for theirs, ours in MLPERF_PREFIXES.items()}
    shared = {replace_prefix(name, prefixes): t for name, t in state.items() if not name.startswith("heads.")}
    boxes, classes = {}, {}
    for level, num_anchors in enumerate(ANCHORS_PER_CELL):
        for kind in ("weight", "bias"):
            fused = state[f"heads.{level}.{kind}"].unflatten(0, (num_anchors, -1)).transpose(0, 1)
            boxes[f"loc.{level}.{kind}"] = fused[:4].flatten(0, 1)
            classes[f"conf.{level}.{kind}"] = fused[4:].flatten(0, 1)
    return shared | boxes | classes


def from_reference(state: Mapping[str, Tensor], prefixes: Mapping[str, str] = MLPERF_PREFIXES) -> dict[str, Tensor]:
    """Convert a state dict of the MLPerf reference, or of SSD300 v1.1 with its prefixes, to ours.

    KeyError names a missing or unknown tensor.
    """
    ours = {replace_prefix(name, prefixes): t for name, t in state.items() if not name.startswith(("loc.", "conf."))}
    for level, num_anchors in enumerate(ANCHORS_PER_CELL):
        for kind in ("weight", "bias"):
            parts = [state[f"{part}.{level}.{kind}"].unflatten(0, (-1, num_anchors)) for part in ("loc", "conf")]
            ours[f"heads.{level}.{kind}"] = torch.cat(parts).transpose(0, 1).flatten(0, 1)
    return ours
