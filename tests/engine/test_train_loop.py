"""Single training steps, and the metadata of a run."""

import sys
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detection.data.batch import RankBatch
from detection.engine import metadata, train_loop
from detection.engine.state import TrainState
from detection.runtime import device
from detection.runtime.distributed import DistContext

CPU = torch.device("cpu")


class Batch(NamedTuple):
    inputs: Tensor


def test_step_with_an_overflow_is_counted_as_skipped():
    model = nn.Linear(1, 1, bias=False)
    state = TrainState(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        scaler=torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2),
        precision=device.select_precision("fp32", CPU),
        skipped_steps=torch.zeros((), dtype=torch.int64),
    )
    workload = SimpleNamespace(loss_names=("a",), loss=lambda model, batch: model(batch.inputs).sum()[None])
    config = SimpleNamespace(grad_accum_steps=1, batch_size=1)
    weights = []
    # The scale grows after two good steps. Its growth must not hide the step that is skipped after it.
    for value in (1.0, 1.0, float("inf"), 1.0):
        rank_batch = RankBatch(Batch(torch.full((1, 1), value)), 1, 1.0)
        train_loop.train_step(state, rank_batch, workload, config, DistContext(0, 1, CPU))
        weights.append(model.weight.item())
    assert (state.step, int(state.skipped_steps)) == (4, 1)
    assert weights[2] == weights[1] > weights[3]


def test_metadata_names_the_source_of_the_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert metadata.installed_packages() == "unknown"
    (tmp_path / ".packages").write_text("constraints.txt sha256:0123456789ab\n")
    assert metadata.installed_packages() == "constraints.txt sha256:0123456789ab"
