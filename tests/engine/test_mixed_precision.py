"""Loss scaling through a step that overflows, for each workload.

The forward pass is in float32, since fp16 takes minutes on a CPU. tests/engine/test_fake_cuda.py runs it in fp16.
"""

import pytest
import torch

import maskrcnn.commands
import maskrcnn.config
import narrow_ssd
import retinanet.commands
import ssd.commands
import ssd.config
import tiny_maskrcnn
import tiny_retinanet
from detection.data.batch import RankBatch
from detection.engine import optim, train_loop
from detection.engine.initialization import build_state
from detection.runtime.device import select_precision
from detection.runtime.distributed import DistContext

RANKS = DistContext(0, 1, torch.device("cpu"))
FLAGS = ("--num-classes", "4", "--batch-size", "2", "--precision", "fp16", "--device", "cpu")


def ssd_workload(patch):
    narrow_ssd.make_narrow(patch)
    config = ssd.config.load(["--dataset", "toy", *FLAGS], {}).config
    return ssd.commands.make_random_workload(config, RANKS), config


def maskrcnn_workload(patch):
    small = {f"MASKRCNN_{name}": value for name, value in tiny_maskrcnn.SMALL.items()}
    config = maskrcnn.config.load(list(FLAGS), small).config
    return maskrcnn.commands.make_random_workload(config, RANKS), config


def retinanet_workload(patch):
    config = tiny_retinanet.make_config(*FLAGS)
    return retinanet.commands.make_random_workload(config, RANKS), config


@pytest.mark.parametrize("make", [ssd_workload, maskrcnn_workload, retinanet_workload])
def test_step_that_overflows_is_skipped_and_the_next_one_trains(make, monkeypatch):
    torch.manual_seed(0)
    workload, config = make(monkeypatch)
    state = build_state(workload, config, RANKS)
    assert state.scaler.is_enabled()
    state.precision = select_precision("fp32", RANKS.device)
    batch = workload.dummy_batch()
    optim.set_learning_rates(state.optimizer, lambda factor: 1e-3 * factor)
    trained = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    initial = [parameter.detach().clone() for parameter in trained]

    def train(scale, loss_weight):
        state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": scale})
        loss = train_loop.train_step(state, RankBatch(batch, 2, loss_weight), workload, config, RANKS)
        assert loss.isfinite().all()

    train(2.0**127, 1e4)  # the scaled loss is infinite
    assert (state.step, int(state.skipped_steps)) == (1, 1)
    assert all(torch.equal(*pair) for pair in zip(trained, initial, strict=True))
    train(1.0, 0.5)
    assert (state.step, int(state.skipped_steps)) == (2, 1)
    assert all(parameter.isfinite().all() for parameter in trained)
    assert sum(not torch.equal(*pair) for pair in zip(trained, initial, strict=True)) > 0.8 * len(trained)
