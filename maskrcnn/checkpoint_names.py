"""Tensor names of checkpoints: conversion from and to the MLPerf reference (maskrcnn-benchmark).

Shapes and layouts are the same. The reference's batch norm, which is always frozen, does not count batches.
"""

import re
from collections.abc import Mapping

from torch import Tensor

TO_REFERENCE = {
    "backbone.body.conv1.": "backbone.body.stem.conv1.",
    "backbone.body.bn1.": "backbone.body.stem.bn1.",
    **{
        f"backbone.fpn.{kind}_blocks.{level}.0.": f"backbone.fpn.fpn_{kind}{level + 1}."
        for level in range(4)
        for kind in ("inner", "layer")
    },
    "rpn.head.conv.0.0.": "rpn.head.conv.",
    "box_head.features.": "roi_heads.box.feature_extractor.",
    "box_head.predictor.": "roi_heads.box.predictor.",
    **{f"mask_head.features.{i}.0.": f"roi_heads.mask.feature_extractor.mask_fcn{i + 1}." for i in range(4)},
    "mask_head.predictor.": "roi_heads.mask.predictor.",
}
FROM_REFERENCE = {theirs: ours for ours, theirs in TO_REFERENCE.items()}


def replace_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    """Replace the prefix of a tensor's name by the table. Most of the backbone has the same names in both."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def to_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert our state dict, or some of its tensors, to the reference's names and order."""
    names = {replace_prefix(name, TO_REFERENCE): name for name in state if not name.endswith("num_batches_tracked")}
    blocks = {block: position for position, block in enumerate(dict.fromkeys(map(block_name, names)))}
    return {
        theirs: state[names[theirs]]
        for theirs in sorted(names, key=lambda name: (blocks[block_name(name)], "downsample" not in name))
    }


def from_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the reference's state dict to our names, without its anchors. Unknown tensors keep theirs."""
    return {
        replace_prefix(name, FROM_REFERENCE): tensor
        for name, tensor in state.items()
        if not name.startswith("rpn.anchor_generator.")
    }


def block_name(name: str) -> str:
    """Return the block of a tensor of the reference. Only their order differs from ours: a shortcut comes first.

    A level of the feature pyramid counts as a block.
    """
    match = re.match(r"backbone\.body\.layer\d\.\d+\.|backbone\.fpn\.fpn_\D+(\d)\.", name)
    if not match:
        return name
    return f"level {match[1]}" if match[1] else match[0]
