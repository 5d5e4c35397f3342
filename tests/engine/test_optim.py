import sys
import types

import pytest
import torch
from torch import nn

from detection.config.settings import InputError
from detection.engine import optim

SCHEDULE = {
    "peak": 0.09,
    "warmup_steps": 650,
    "warmup_factor": 0.0,
    "lr_decay_epochs": (44, 55),
    "lr_decay_factor": 0.1,
}


def test_warm_up_is_linear_from_zero_to_the_peak():
    rates = [optim.mlperf_ssd_lr(step, 1, 100, **SCHEDULE) for step in (0, 325, 649, 650, 5000)]
    assert rates == pytest.approx([0, 0.045, 0.09 * 649 / 650, 0.09, 0.09])


def test_warm_up_factor_sets_the_first_rate():
    rate = optim.mlperf_ssd_lr(0, 1, 100, **(SCHEDULE | {"warmup_factor": 1.0}))
    assert rate == pytest.approx(0.045)


def test_rate_decays_after_the_decay_epochs():
    rates = [optim.mlperf_ssd_lr(10**6, epoch, 100, **SCHEDULE) for epoch in (44, 45, 55, 56)]
    assert rates == pytest.approx([0.09, 0.009, 0.009, 0.0009])


def test_without_warm_up_training_starts_at_the_peak():
    assert optim.mlperf_ssd_lr(0, 1, 100, **(SCHEDULE | {"warmup_steps": 0})) == pytest.approx(0.09)


MULTISTEP = {
    "peak": 0.1,
    "warmup_steps": 10,
    "warmup_factor": 0.2,
    "warmup_method": "linear",
    "decay_steps": (20, 30),
    "lr_decay_factor": 0.1,
    "steps_ahead": 0,
}


def test_multistep_rate_warms_up_linearly_and_decays_at_its_steps():
    rates = [optim.multistep_lr(step, 1, 1, **MULTISTEP) for step in (0, 5, 10, 19, 20, 29, 30)]
    assert rates == pytest.approx([0.02, 0.06, 0.1, 0.1, 0.01, 0.01, 0.001])
    assert optim.multistep_lr(0, 1, 1, **(MULTISTEP | {"warmup_steps": 0})) == 0.1


def test_multistep_rate_can_be_a_step_ahead():
    ahead = MULTISTEP | {"steps_ahead": 1}
    for step in range(40):
        assert optim.multistep_lr(step, 1, 1, **ahead) == optim.multistep_lr(step + 1, 1, 1, **MULTISTEP)


def test_mlperf_linear_warm_up_adds_the_same_to_every_group():
    method = MULTISTEP | {"warmup_method": "mlperf_linear", "warmup_factor": 0.01}
    steps = (0, 5, 9, 10, 20)
    rates = [optim.multistep_lr(step, 1, 1, **method) for step in steps]
    assert rates == pytest.approx([0, 0.05, 0.09, 0.1, 0.01])
    assert [optim.multistep_lr(step, 1, 1, 2.0, **method) for step in steps] == pytest.approx(
        [0.1, 0.15, 0.19, 0.2, 0.02]
    )


def test_rate_of_each_group_follows_the_schedule_of_its_factor():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    optimizer = optim.build_optimizer(model, backend="torch", momentum=0.0, weight_decay=0.5, bias_lr_factor=2.0)
    assert optim.set_learning_rates(optimizer, lambda factor: 10 + factor) == 11
    assert [group["lr"] for group in optimizer.param_groups] == [11, 12]


def test_frozen_batch_norm_is_constant():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    optim.freeze_batch_norm(model)
    mean = model[1].running_mean.clone()
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    assert torch.equal(model[1].running_mean, mean)
    trained = optim.build_optimizer(model, backend="torch", momentum=0.9, weight_decay=0.0).param_groups[0]["params"]
    assert [p.shape for p in trained] == [model[0].weight.shape, model[0].bias.shape]


@pytest.mark.parametrize("error", [None, "has no such kernel"])
def test_update_is_fused_if_the_device_supports_it(monkeypatch, error):
    if error:

        def missing(*_, **__):
            raise NotImplementedError(error)

        monkeypatch.setattr(torch, "_fused_sgd_", missing)
    optimizer = optim.build_optimizer(nn.Linear(2, 2), backend="torch", momentum=0.9, weight_decay=0.1)
    assert optimizer.defaults["fused"] is (error is None)


def test_missing_apex_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    model = nn.Linear(2, 2)
    with pytest.raises(InputError, match="--optimizer-backend apex"):
        optim.build_optimizer(model, backend="apex", momentum=0.9, weight_decay=0.0)


def test_installed_apex_is_used(monkeypatch):
    fake_apex = types.ModuleType("apex.optimizers")
    fake_apex.FusedSGD = torch.optim.SGD
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", fake_apex)
    optimizer = optim.build_optimizer(nn.Linear(2, 2), backend="apex", momentum=0.9, weight_decay=0.1)
    assert (optimizer.defaults["momentum"], optimizer.defaults["weight_decay"]) == (0.9, 0.1)


def test_weight_decay_can_exclude_biases_and_batch_norm():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    optimizer = optim.build_optimizer(
        model, backend="torch", momentum=0.0, weight_decay=0.5, weight_decay_on_bias_and_norm=False
    )
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    optimizer.step()
    assert [float(p.detach().mean()) for p in model.parameters()] == [0.5, 1, 1, 1]


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_skipped_first_step_leaves_no_uninitialized_momentum(momentum):
    """In fp16 the first steps are often skipped, because the loss scale is too large."""
    weights = []
    for skipped in (True, False):
        layer = torch.nn.Linear(1000, 1, bias=False)
        torch.nn.init.ones_(layer.weight)
        sgd = optim.build_optimizer(layer, backend="torch", momentum=momentum, weight_decay=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        optim.set_learning_rates(sgd, lambda factor: 0.1 * factor)
        garbage = [torch.full((1, 1000), 7e9) for _ in range(50)]  # uninitialized memory
        del garbage
        for factor in (float("inf"), 1.0, 2.0) if skipped else (1.0, 2.0):
            sgd.zero_grad(set_to_none=True)
            scaler.scale(layer(torch.ones(1, 1000)).sum() * factor).backward()
            scaler.step(sgd)
            scaler.update()
        weights.append(layer.weight.detach())
    assert torch.equal(*weights)
