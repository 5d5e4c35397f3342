"""The layers of a network as a table: what ./run_and_time.sh --model-summary prints."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from detection.config.run_config import RunConfig
from detection.engine import optim

Config = TypeVar("Config", bound=RunConfig)
HEADINGS = ("layer", "kind", "weights", "parameters", "")


def describe(make_model: Callable[[Config], nn.Module], config: Config) -> str:
    """The network of the settings, layer by layer in the order it is written in, and the sums; num_classes is known.

    Of each layer that has weights: its name and kind, the shapes of weights and biases, the number of both together,
    and whether they are trained. No memory is taken for them.
    """
    with torch.device("meta"):
        model = make_model(config)
    if config.freeze_batch_norm:
        optim.freeze_batch_norm(model)
    rows = [HEADINGS]
    for name, layer in model.named_modules():
        if weights := list(layer.parameters(recurse=False)):
            shapes = " + ".join("×".join(map(str, tensor.shape)) for tensor in weights)
            trained = "trained" if any(tensor.requires_grad for tensor in weights) else "frozen"
            rows.append((name, type(layer).__name__, shapes, f"{sum(tensor.numel() for tensor in weights):,}", trained))
    wide = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{name:<{wide[0]}}  {kind:<{wide[1]}}  {shapes:<{wide[2]}}  {count:>{wide[3]}}  {trained}".rstrip()
        for name, kind, shapes, count, trained in rows
    ]
    total = sum(tensor.numel() for tensor in model.parameters())
    trained_ones = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
    sums = (
        f"{config.network_name} for {config.num_classes} classes: {len(rows) - 1} layers, {total:,} parameters, "
        f"{trained_ones:,} of them trained and {total - trained_ones:,} frozen"
    )
    return "\n".join([*lines, "", sums])
