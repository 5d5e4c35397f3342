"""Comparisons of the optimization: learning rates, parameter groups, initial weights."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from detection.engine import optim
from detection.engine.initialization import build_state
from detection.engine.state import TrainState
from detection.engine.workload import Workload
from detection.evaluation.conformance import Comparison, ConformanceContext, max_abs_error
from detection.runtime.distributed import DistContext
from maskrcnn import checkpoint_names
from maskrcnn.commands import make_random_workload
from maskrcnn.conformance.inputs import reference_config
from maskrcnn.data import Batch
from maskrcnn.model import make_model

# Two samples of normal numbers differ in their standard deviation by about one standard error. The largest of 768
# numbers, as many as the smallest tensor has, varies by a factor of 1.15.
DEVIATION_TOLERANCE, MAXIMUM_TOLERANCE = 5.0, 0.5


def build_run(context: ConformanceContext, *flags: str) -> tuple[TrainState, Workload[Batch]]:
    """Build the network, its optimizer and its schedule as a run on one rank does, without storage for tensors."""
    config = reference_config("--precision", context.precision.name, "--compile", "off", *flags)
    ranks = DistContext(0, 1, torch.device("meta"))
    with ranks.device:
        workload = make_random_workload(config, ranks)
    return build_state(workload, config, ranks), workload


def compare_learning_rates(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the learning rates of weights and biases in the first hundred steps, and around each change."""
    rows = context.vectors["schedule_rows"]
    for case in range(context.scalar("schedule_cases")):
        peak, *decay_steps, warmup_steps, warmup_factor = context.vectors[f"schedule{case}_settings"].tolist()
        state, workload = build_run(
            context,
            # The base learning rate is that of 16 images.
            *("--batch-size", "16", "--base-lr", str(peak)),
            *("--lr-decay-images", ",".join(str(round(16 * step)) for step in decay_steps)),
            *("--warmup-method", str(context.vectors[f"schedule{case}_method"])),
            *("--warmup-steps", str(round(warmup_steps)), "--warmup-factor", str(warmup_factor)),
        )
        first = context.vectors[f"schedule{case}_first_hundred"]
        expected = np.concatenate([np.column_stack([np.arange(len(first)), first]), rows[rows[:, 0] == case, 1:]])
        actual = []
        for step in expected[:, 0].astype(int).tolist():
            optim.set_learning_rates(state.optimizer, partial(workload.lr_schedule, step, 1, 1))
            actual.append([group["lr"] for group in state.optimizer.param_groups])
        errors = np.abs(np.array(actual) - expected[:, 1:]).max(axis=0) / peak
        for name, error in zip(("weights", "biases"), errors.tolist(), strict=True):
            yield Comparison(f"learning rate {case}: {name}", error, 1e-9)


def compare_optimizer(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the factor of the learning rate, the weight decay and the momentum of each parameter."""
    expected = context.vector("optimizer_groups").cpu()
    state, _ = build_run(context)
    optim.set_learning_rates(state.optimizer, lambda lr_factor: lr_factor)
    groups = {id(parameter): group for group in state.optimizer.param_groups for parameter in group["params"]}
    trained = {name: parameter for name, parameter in state.model.named_parameters() if id(parameter) in groups}
    ordered = checkpoint_names.to_reference(trained)
    rows = [[groups[id(p)][key] for key in ("lr", "weight_decay", "momentum")] for p in ordered.values()]
    yield Comparison("optimizer: parameters", float(list(ordered) != context.network.parameters), 0)
    error = max_abs_error(torch.tensor(rows, dtype=torch.float64), expected)
    yield Comparison("optimizer: settings by parameter", error, 1e-12)


def compare_initialization(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the distribution of each tensor that does not come from the pretrained backbone."""
    expected = context.vector("initial_std_max").cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_model(reference_config())
    tensors = {
        name: parameter.detach()
        for name, parameter in checkpoint_names.to_reference(dict(model.named_parameters())).items()
        if not name.startswith("backbone.body.")
    }
    names = context.vectors["initial_names"].tolist()
    yield Comparison("initial weights: tensors", float(list(tensors) != names), 0)
    if list(tensors) == names:
        actual = torch.tensor([[tensor.std(), tensor.abs().max()] for tensor in tensors.values()])
        sizes = torch.tensor([tensor.numel() for tensor in tensors.values()])
        is_random = expected[:, 0] > 0
        ratios = (actual / expected)[is_random]
        error = float(((ratios[:, 0] - 1).abs() * sizes[is_random].sqrt()).max())
        yield Comparison("initial weights: deviation (std. errors)", error, DEVIATION_TOLERANCE)
        error = float(ratios[:, 1].log().abs().max())
        yield Comparison("initial weights: largest (log. of ratio)", error, MAXIMUM_TOLERANCE)
        yield Comparison("initial biases", max_abs_error(actual[~is_random], expected[~is_random]), 0)
