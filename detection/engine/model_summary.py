"""Table of a network's layers, as ./run_and_time.sh --model-summary prints it."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from detection.config.run_config import RunConfig
from detection.engine import optim

Config = TypeVar("Config", bound=RunConfig)
HEADINGS = ("layer", "kind", "weights", "parameters", "")


def make_meta_model(make_model: Callable[[Config], nn.Module], config: Config) -> nn.Module:
    """Build the model as it trains, on the meta device, without memory. num_classes must be known."""
    with torch.device("meta"):
        model = make_model(config)
    if config.freeze_batch_norm:
        optim.freeze_batch_norm(model)
    return model


def summarize_model(make_model: Callable[[Config], nn.Module], config: Config) -> str:
    """Return a table of the layers with weights, and the total numbers of parameters. num_classes must be known.

    Columns: name, kind, shapes of weights and biases, number of parameters, trained or frozen.
    """
    model = make_meta_model(make_model, config)
    rows = [HEADINGS]
    for name, layer in model.named_modules():
        if weights := list(layer.parameters(recurse=False)):
            shapes = " + ".join("×".join(map(str, tensor.shape)) for tensor in weights)
            status = "trained" if any(tensor.requires_grad for tensor in weights) else "frozen"
            rows.append((name, type(layer).__name__, shapes, f"{sum(tensor.numel() for tensor in weights):,}", status))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {shapes:<{widths[2]}}  {count:>{widths[3]}}  {status}".rstrip()
        for name, kind, shapes, count, status in rows
    ]
    total = sum(tensor.numel() for tensor in model.parameters())
    num_trained = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
    totals = (
        f"{config.network_name} for {config.num_classes} classes: {len(rows) - 1} layers, {total:,} parameters, "
        f"{num_trained:,} trained and {total - num_trained:,} frozen"
    )
    return "\n".join([*lines, "", totals])
