"""Tests of what is handed to the training loop. Conformance tests compare it with the MLPerf reference."""

import pytest
import torch

from detection.config.settings import InputError
from detection.runtime.distributed import DistContext
from maskrcnn.config import load
from maskrcnn.evaluator import MaskRCNNEvaluator
from maskrcnn.model import make_model
from maskrcnn.train import make_workload, predict

RANKS = DistContext(0, 1, torch.device("cpu"))
SMALL = ("--backbone", "resnet18", "--num-classes", "3")


def make_schedule(*flags):
    """Return the schedule of a small network."""
    config = load([*SMALL, *flags], {}).config
    return make_workload(config, RANKS, 0, make_model(config), MaskRCNNEvaluator(config, RANKS, predict)).lr_schedule


def test_schedule_of_the_torchvision_variant_is_a_step_behind():
    reference, torchvision = make_schedule(), make_schedule("--variant", "torchvision")
    assert torchvision(1, 1, 1, 1.0) == reference(0, 1, 1, 1.0) != torchvision(0, 1, 1, 1.0)


def test_warm_up_below_zero_is_rejected():
    flags = ("--warmup-method", "mlperf_linear", "--batch-size", "16", "--base-lr", "0.08", "--warmup-steps", "800")
    load([*flags, "--warmup-factor", "0.0001"], {}).config.check_world_size(1)
    config = load([*flags, "--warmup-factor", "0.0002"], {}).config
    config.check_world_size(2)
    with pytest.raises(InputError, match=r"--warmup-factor 0.0002: .* below 0. Pass 0.0001 to start at 0"):
        config.check_world_size(1)


def test_mask_head_of_the_torchvision_variant_starts_with_random_biases():
    predictors = [
        make_model(load([*SMALL, "--variant", variant], {}).config).mask_head.predictor
        for variant in ("reference", "torchvision")
    ]
    for layer in ("conv5_mask", "mask_fcn_logits"):
        reference, torchvision = (getattr(predictor, layer).bias for predictor in predictors)
        assert not reference.any()
        assert torchvision.all()
