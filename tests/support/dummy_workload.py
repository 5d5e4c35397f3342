"""Minimal workload on the real training loop and process group, with fault injection.

Run as a program: `python tests/support/dummy_workload.py [--name value ...]`, or under torchrun. FAULT selects a fault:
"hang 1 5" hangs rank 1 at step 5. Kinds: hang, exit, kill, nan, slow, worker. If FAULT_MARK names a file, the fault
happens once.
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
from detection.data.batch import RankBatch
from detection.data.loader import EpochBatchSampler, iter_batches, make_loader
from detection.engine import entrypoint, train_loop
from detection.engine.workload import EXIT_TARGET_NOT_REACHED, Workload


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config(RunConfig):
    benchmark: ClassVar[str] = "dummy"
    weight_decay: float = setting(1e-3, help="")
    epochs: int = setting(3, ge=1, help="")
    eval_epochs: EvalEpochs = setting((1, 2, 3), help="")
    num_images: int = setting(24, ge=1, help="")
    step_s: float = setting(0.0, ge=0, help="minimum time of a step")
    target: float = setting(2.0, help="never reached")


class Batch(NamedTuple):
    inputs: Tensor
    expected: Tensor


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
        self.sampler = EpochBatchSampler(
            config.num_images, config.batch_size, seed=seed, ranks=ranks, last_batch=config.last_batch
        )
        self.steps_per_epoch = len(self.sampler)
        worker_shm.check(config.num_workers * ranks.world_size, config.batch_size * 4 * 3 * 6 * 6)
        dataset = Images(seed, os.getpid())
        self.loader = make_loader(dataset, self.sampler, num_workers=config.num_workers, device=ranks.device)
        self.ranks, self.step_s = ranks, config.step_s

    def train_batches(self, epoch, skip_images):
        self.sampler.epoch, self.sampler.skip_images = epoch, skip_images
        for step, (batch, (begin, end, size)) in enumerate(
            zip(iter_batches(self.loader), self.sampler.rank_slices(), strict=True)
        ):
            time.sleep(self.step_s)
            batch = FAULT.inject(self.ranks.rank, (epoch - 1) * self.steps_per_epoch + step, batch)
            yield RankBatch(batch, size, self.ranks.world_size / size if end > begin else 0.0)


class Fault:
    """Fault to inject: kind, rank and step."""

    def __init__(self, text: str):
        self.kind, *location = text.split() or [""]
        self.rank, self.step = (int(number) for number in (*location, 0, 0)[:2])

    def inject(self, rank: int, step: int, batch: Batch) -> Batch:
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
            return batch._replace(expected=batch.expected * float("nan"))
        return batch


FAULT = Fault(os.environ.get("FAULT", ""))
MARK = Path(os.environ["FAULT_MARK"]) if "FAULT_MARK" in os.environ else None


def network() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)]
    return nn.Sequential(*layers)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch.inputs).flatten() - batch.expected).square().sum()


def train(config: Config, process: entrypoint.ProcessContext) -> int:
    ranks = process.ranks
    with entrypoint.open_run(config, process) as run:
        data: list[Data] = []
        inputs = torch.linspace(-1, 1, 4 * 108).view(4, 3, 6, 6).to(ranks.device)

        def open_data() -> Data:
            data.append(Data(config, ranks, run.seed))
            return data[0]

        def evaluate(model: nn.Module, _: Data) -> dict[str, float]:
            time.sleep(5 * config.step_s)
            return {"AP": float(torch.sigmoid(model(inputs).mean()))}

        workload = Workload(
            model=network(),
            loss=lambda model, batch: loss(model, batch)[None],
            loss_names=("error",),
            dummy_batch=lambda: Batch(torch.zeros(config.batch_size, 3, 6, 6), torch.zeros(config.batch_size)),
            dummy_eval_batch=lambda: Batch(inputs, inputs),
            make_train_source=open_data,
            make_eval_source=open_data,
            predict=lambda model, batch: model(batch.inputs),
            lr_schedule=lambda step, epoch, _, lr_factor: lr_factor * (0.05 / epoch + 1e-4 * step),
            evaluate=evaluate,
            evaluate_other=lambda *_: None,
            targets={"AP": config.target},
            mlperf_accuracy=lambda metrics: metrics["AP"],
        )
        result = train_loop.train_to_target(workload, run)
    print(f"ended after epoch {result.epoch}")
    return 0 if result.target_reached else EXIT_TARGET_NOT_REACHED


if __name__ == "__main__":
    entrypoint.hard_exit(
        entrypoint.main(sys.argv[1:], lambda argv: resolve(Config, "DUMMY_", argv, None).config, train)
    )
