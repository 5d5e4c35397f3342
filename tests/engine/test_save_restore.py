from types import SimpleNamespace

import torch
from torch import nn

from detection.checkpoint import checkpointer
from detection.checkpoint.resume import ResumePoint
from detection.engine import optim, save_restore
from detection.engine.state import TrainState
from detection.runtime import device
from detection.runtime.distributed import DistContext

CPU = torch.device("cpu")
CONFIG = SimpleNamespace(optimizer="sgd", global_batch_size=lambda world_size: 4)


def make_state(**settings):
    model = nn.Linear(2, 1)
    sgd = optim.build_optimizer(model, backend="torch", momentum=0.9, **settings)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainState(model, sgd, scaler, device.select_precision("fp32", CPU), torch.zeros((), dtype=torch.int64))


def test_resumed_run_has_the_hyperparameters_of_its_settings(tmp_path):
    """A changed setting is reported as changed, so it must have an effect."""
    old = make_state(weight_decay=0.1, bias_lr_factor=2.0)
    old.model(torch.ones(1, 2)).sum().backward()
    old.optimizer.step()
    saved = {
        "model": old.model.state_dict(),
        "batch_norm": torch.zeros(1, 0),
        "optimizer": old.optimizer.state_dict(),
        "scaler": {},
        "config": "{}",
        "random": checkpointer.rng_states(CPU),
        **{"epoch": 1, "samples": 4, "evaluated": False, "step": 1, "global_batch_size": 4},
    }
    new = make_state(weight_decay=0.5, bias_lr_factor=3.0)
    save_restore.restore(new, ResumePoint(tmp_path, saved, False), CONFIG, DistContext(0, 1, CPU))
    weights, biases = new.optimizer.param_groups
    assert (weights["weight_decay"], biases["lr_factor"]) == (0.5, 3.0)
    for name, parameter in new.model.named_parameters():
        momentum = old.optimizer.state[old.model.get_parameter(name)]["momentum_buffer"]
        assert momentum.any()
        assert torch.equal(new.optimizer.state[parameter]["momentum_buffer"], momentum)
