"""Tests of what is handed to the training loop, against the vectors of the MLPerf reference."""

import re

import numpy as np
import pytest
import torch

from detection.config.settings import InputError
from detection.engine import optim
from detection.runtime.distributed import DistContext
from maskrcnn.config import load
from maskrcnn.evaluator import MaskRCNNEvaluator
from maskrcnn.model import make_model
from maskrcnn.train import make_workload, predict
from paths import ROOT

GOLDEN = ROOT / "tests/golden/maskrcnn/maskrcnn_reference.npz"
RANKS = DistContext(0, 1, torch.device("cpu"))
SMALL = ("--backbone", "resnet18", "--num-classes", "3")


def make_optimizer_and_schedule(*flags):
    """Return the optimizer and the schedule of a small network."""
    config = load([*SMALL, *flags], {}).config
    model = make_model(config)
    optimizer = optim.build_optimizer(
        model,
        backend="torch",
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        weight_decay_on_bias_and_norm=config.weight_decay_on_bias_and_norm,
        bias_lr_factor=config.bias_lr_factor,
    )
    workload = make_workload(config, RANKS, 0, model, MaskRCNNEvaluator(config, RANKS, predict))
    return optimizer, workload.lr_schedule


@pytest.mark.parametrize("case", range(4))
def test_learning_rates_of_weights_and_biases_match_the_reference(case):
    vectors = np.load(GOLDEN)
    peak, *steps, warmup_steps, factor = vectors[f"schedule{case}_settings"].tolist()
    optimizer, schedule = make_optimizer_and_schedule(
        *("--batch-size", "16", "--base-lr", str(peak), "--warmup-steps", str(int(warmup_steps))),
        *("--lr-decay-images", ",".join(str(16 * int(step)) for step in steps), "--warmup-factor", str(factor)),
        *("--warmup-method", str(vectors[f"schedule{case}_method"])),
    )
    rows = vectors["schedule_rows"]
    expected = rows[rows[:, 0] == case, 1:].tolist()
    expected += [(step, *rates) for step, rates in enumerate(vectors[f"schedule{case}_first_hundred"].tolist())]
    for step, *rates in expected:
        optim.set_learning_rates(optimizer, lambda lr_factor, step=step: schedule(int(step), 1, 1, lr_factor))
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(rates, rel=1e-9)


def test_schedule_of_the_torchvision_variant_is_a_step_behind():
    _, reference = make_optimizer_and_schedule()
    _, torchvision = make_optimizer_and_schedule("--variant", "torchvision")
    assert torchvision(1, 1, 1, 1.0) == reference(0, 1, 1, 1.0) != torchvision(0, 1, 1, 1.0)


def test_warm_up_below_zero_is_rejected():
    flags = ("--warmup-method", "mlperf_linear", "--batch-size", "16", "--base-lr", "0.08", "--warmup-steps", "800")
    load([*flags, "--warmup-factor", "0.0001"], {}).config.check_world_size(1)
    config = load([*flags, "--warmup-factor", "0.0002"], {}).config
    config.check_world_size(2)
    with pytest.raises(InputError, match=r"--warmup-factor 0.0002: .* below 0. Pass 0.0001 to start at 0"):
        config.check_world_size(1)


# Patterns of the reference's tensor names and ours.
REFERENCE_RENAMES = (
    (r"fpn_(inner|layer)(\d)", lambda match: f"{match[1]}_blocks.{int(match[2]) - 1}.0"),
    (r"rpn\.head\.conv\.", "rpn.head.conv.0.0."),
    (r"roi_heads\.(box|mask)\.", r"\1_head."),
    (r"feature_extractor", "features"),
    (r"mask_fcn(\d)", lambda match: f"{int(match[1]) - 1}.0"),
)


def test_initial_weights_have_the_distributions_of_the_reference():
    """Standard deviations and largest values of everything but the backbone, which starts from a file."""
    vectors = np.load(GOLDEN)
    torch.manual_seed(0)
    model = make_model(load(["--num-classes", "81"], {}).config)
    ours = {name for name, _ in model.named_parameters() if not name.startswith("backbone.body")}
    for name, (std, maximum) in zip(vectors["initial_names"].tolist(), vectors["initial_std_max"], strict=True):
        for theirs, replacement in REFERENCE_RENAMES:
            name = re.sub(theirs, replacement, name)
        tensor = model.get_parameter(name).detach()
        ours.remove(name)
        assert float(tensor.std(correction=0)) == pytest.approx(std, rel=0.1), name
        assert float(tensor.abs().max()) == pytest.approx(maximum, rel=0.25), name
    assert not ours


def test_mask_head_of_the_torchvision_variant_starts_with_random_biases():
    predictors = [
        make_model(load([*SMALL, "--variant", variant], {}).config).mask_head.predictor
        for variant in ("reference", "torchvision")
    ]
    for layer in ("conv5_mask", "mask_fcn_logits"):
        reference, torchvision = (getattr(predictor, layer).bias for predictor in predictors)
        assert not reference.any()
        assert torchvision.all()
