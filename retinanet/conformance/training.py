"""Comparisons of the optimization: learning rates, and steps of Adam."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from detection.engine import optim
from detection.evaluation.conformance import Comparison, ConformanceContext
from detection.runtime.device import device_constant
from detection.runtime.distributed import DistContext
from retinanet.anchors import make_anchors
from retinanet.conformance.boxes import LOSS_KEYS
from retinanet.conformance.inputs import image_hw, load_cases, reference_config
from retinanet.conformance.network import max_each_error, reference_model, trained_parameters
from retinanet.evaluator import RetinaNetEvaluator
from retinanet.loss import retinanet_loss
from retinanet.model import make_model
from retinanet.resize import PIXEL_MEAN, PIXEL_STD
from retinanet.train import make_workload

RATE_TOLERANCE = 1e-12
WARMUP_BASE_LR = 1e-4
# Rounding grows from step to step: relative errors of the losses in the first steps, and in the others.
NUM_FIRST_STEPS = 6
FIRST_LOSS_TOLERANCE, LAST_LOSS_TOLERANCE = 1e-3, 2e-2
CHANGE_TOLERANCE = 1e-2


def compare_warmup(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare the learning rates of a run's schedule."""
    config, ranks = reference_config(), DistContext(0, 1, torch.device("cpu"))
    with torch.device("meta"):
        model = make_model(config)
    errors: dict[tuple[float, float], float] = {}
    for steps_per_epoch, epochs, factor, step, expected in context.vectors["warmup"].tolist():
        changed = replace(config, base_lr=WARMUP_BASE_LR, warmup_epochs=epochs, warmup_factor=factor)
        workload = make_workload(changed, ranks, 0, model, RetinaNetEvaluator(changed, ranks))
        rate = workload.lr_schedule(int(step), 1 + int(step // steps_per_epoch), int(steps_per_epoch), 1.0)
        errors[epochs, factor] = max(errors.get((epochs, factor), 0.0), abs(rate - expected))
    for (epochs, factor), error in errors.items():
        yield Comparison(f"warm-up: {epochs:g} epochs from {factor:g}", error, RATE_TOLERANCE)


def compare_adam(context: ConformanceContext) -> Iterator[Comparison]:
    """Compare steps of Adam on one batch: learning rates, losses, and how far each parameter moves."""
    expected = context.vectors["adam_steps"]
    base_lr, factor, warmup_steps = context.vectors["adam_lr_factor_iterations"].tolist()
    cases = context.vectors["adam_match_cases"].tolist()
    size_hw = image_hw(context, cases)
    rng = np.random.default_rng(context.scalar("adam_input_seed"))
    mean, std = (device_constant(values, context.device).view(-1, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    images = (context.as_tensor(rng.random((len(cases), 3, *size_hw))) - mean) / std
    gt, anchors = load_cases(context, cases), make_anchors(*size_hw, context.device)

    model, config = reference_model(context), reference_config()
    optimizer = optim.build_optimizer(
        model, name=config.optimizer, momentum=config.momentum, weight_decay=config.weight_decay
    )
    start = {name: tensor.detach().clone() for name, tensor in trained_parameters(model).items()}
    steps = []
    for step in range(len(expected)):
        schedule = partial(
            optim.linear_warmup_lr,
            *(step, 1, round(warmup_steps)),
            peak=base_lr,
            warmup_epochs=1,
            warmup_start_factor=factor,
        )
        rate = optim.set_learning_rates(optimizer, schedule)
        with context.precision.autocast(context.device):
            outputs = model(images)
        losses = retinanet_loss(outputs.logits, outputs.deltas, anchors, *gt).mean(dim=0)
        losses.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append([rate, *losses.tolist()])

    actual = np.array(steps)
    yield Comparison("Adam: learning rates", float(np.abs(actual - expected)[:, 0].max()), RATE_TOLERANCE)
    errors = np.abs(actual / expected - 1)
    for column, part in enumerate(LOSS_KEYS, start=1):
        first, last = errors[:NUM_FIRST_STEPS, column], errors[NUM_FIRST_STEPS:, column]
        yield Comparison(f"Adam: {part} loss, first steps", float(first.max()), FIRST_LOSS_TOLERANCE)
        yield Comparison(f"Adam: {part} loss, last steps", float(last.max(initial=0)), LAST_LOSS_TOLERANCE)
    changes = [tensor - start[name] for name, tensor in trained_parameters(model).items()]
    norms = torch.stack([change.detach().cpu().double().norm() for change in changes])
    error = max_each_error(norms, context.vectors["adam_change_norm"])
    yield Comparison("Adam: distance of each parameter", error, CHANGE_TOLERANCE)
