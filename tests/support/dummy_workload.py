"""A benchmark as small as can be, on the loop and the ranks that the real ones have: what can go wrong does so here.

Run as a program: `python tests/support/dummy_workload.py [--name value ...]`, or under torchrun. FAULT names what happens in it:
"hang 1 5" (rank 1, step 5), and so exit, kill, nan, slow, worker; once only where FAULT_MARK names a file for it.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from detection.config.run_config import EvalEpochs, RunConfig
from detection.config.settings import STRICT, resolve, setting
from detection.data import worker_shm
from detection.data.batch import Share
from detection.data.loader import EpochSampler, load, make_loader
from detection.engine import entrypoint, train_loop


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config(RunConfig):
    benchmark: ClassVar[str] = "stand_in"
    weight_decay: float = setting(1e-3, help="")
    epochs: int = setting(3, ge=1, help="")
    eval_epochs: EvalEpochs = setting((1, 2, 3), help="")
    num_images: int = setting(24, ge=1, help="")
    step_s: float = setting(0.0, ge=0, help="least time of a step")
    target: float = setting(2.0, help="never reached")


class Batch(NamedTuple):
    inputs: Tensor
    wanted: Tensor


class Images(Dataset):
    def __init__(self, seed: int, pid: int):
        self.seed, self.pid = seed, pid

    def __getitems__(self, keys):
        rows = [np.random.default_rng((self.seed, epoch, index)).standard_normal((3, 6, 6)) for epoch, index in keys]
        if FAULT.kind == "worker" and os.getpid() != self.pid and keys[0][0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        inputs = torch.tensor(np.stack(rows), dtype=torch.float32)
        return Batch(inputs, inputs.mean(dim=(1, 2, 3)) + torch.tensor([float(index) / 24 for _, index in keys]))


class Data:
    categories = ()

    def __init__(self, config, ranks, seed):
        self.train_samples, self.eval_samples = config.num_images, 1
        self.sampler = EpochSampler(
            config.num_images, config.batch_size, seed=seed, ranks=ranks, last_batch=config.last_batch
        )
        self.steps_per_epoch = len(self.sampler)
        worker_shm.check(config.num_workers * ranks.world_size, config.batch_size * 4 * 3 * 6 * 6)
        dataset = Images(seed, os.getpid())
        self.loader = make_loader(dataset, self.sampler, num_workers=config.num_workers, device=ranks.device)
        self.ranks, self.step_s = ranks, config.step_s

    def shares(self, epoch, samples):
        self.sampler.epoch, self.sampler.samples = epoch, samples
        for step, (batch, (begin, end, size)) in enumerate(
            zip(load(self.loader), self.sampler.stretches(), strict=True)
        ):
            time.sleep(self.step_s)
            batch = FAULT.happen(self.ranks.rank, (epoch - 1) * self.steps_per_epoch + step, batch)
            yield Share(batch, size, self.ranks.world_size / size if end > begin else 0.0)


class Fault:
    """What the test wants to go wrong, where and when."""

    def __init__(self, text: str):
        self.kind, *place = text.split() or [""]
        self.rank, self.step = (int(number) for number in (*place, 0, 0)[:2])

    def happen(self, rank: int, step: int, batch: Batch) -> Batch:
        if rank != self.rank:
            return batch
        if self.kind == "slow":
            time.sleep(0.2)
        if step != self.step or (MARK and MARK.exists()):
            return batch
        if MARK:
            MARK.touch()
        if self.kind == "hang":
            time.sleep(1000)
        if self.kind == "exit":
            os._exit(7)
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "nan":
            return batch._replace(wanted=batch.wanted * float("nan"))
        return batch


FAULT = Fault(os.environ.get("FAULT", ""))
MARK = Path(os.environ["FAULT_MARK"]) if "FAULT_MARK" in os.environ else None


def network() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)]
    return nn.Sequential(*layers)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch.inputs).flatten() - batch.wanted).square().sum()


def train(config: Config, process: entrypoint.Process) -> int:
    ranks = process.ranks
    with entrypoint.opened(config, process) as run:
        data: list[Data] = []
        inputs = torch.linspace(-1, 1, 4 * 108).view(4, 3, 6, 6).to(ranks.device)

        def open_data() -> Data:
            data.append(Data(config, ranks, run.seed))
            return data[0]

        def evaluate(model: nn.Module, _: Data) -> dict[str, float]:
            time.sleep(5 * config.step_s)
            return {"AP": float(torch.sigmoid(model(inputs).mean()))}

        benchmark = train_loop.Benchmark(
            model=network(),
            loss=lambda model, batch: loss(model, batch)[None],
            loss_names=("error",),
            made_up_batch=lambda: Batch(torch.zeros(config.batch_size, 3, 6, 6), torch.zeros(config.batch_size)),
            made_up_eval_batch=lambda: Batch(inputs, inputs),
            open_data=open_data,
            open_eval_data=open_data,
            detect=lambda model, batch: model(batch.inputs),
            learning_rate=lambda step, epoch: 0.05 / epoch + 1e-4 * step,
            evaluate=evaluate,
            targets={"AP": config.target},
            accuracy=lambda metrics: metrics["AP"],
        )
        outcome = train_loop.train_to_target(benchmark, run)
    print(f"ended after epoch {outcome.epoch}")
    return 0 if outcome.reached else train_loop.NOT_REACHED


if __name__ == "__main__":
    entrypoint.end(
        entrypoint.main(sys.argv[1:], lambda argv: resolve(Config, "STANDIN_", argv, None, usage="").config, train)
    )
