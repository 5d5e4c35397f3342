"""The ranks of a run: who they are and how they speak to each other. The only module that imports torch.distributed."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detection.config import Topology
from detection.device import collective_backend


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of a run: one per accelerator, or one alone."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the logs and files."""
        return self.rank == 0

    @property
    def together(self) -> bool:
        """Whether there is anybody to speak to."""
        return self.world_size > 1

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over ranks of a floating-point tensor, in place."""
        if self.together:
            dist.all_reduce(tensor)
            tensor /= self.world_size
        return tensor

    def broadcast(self, value: Any) -> Any:
        """The first rank's value, on every rank; anything that pickles."""
        box = [value]
        if self.together:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Rows of all ranks, (N_0 + N_1 + ..., C), in the order of ranks; each rank gives (N_rank, C)."""
        if not self.together:
            return rows
        counts = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=self.device))
        most = int(torch.cat(counts).max())
        padded = rows.new_zeros(most, rows.shape[1])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])

    def average_batch_norm(self, model: nn.Module) -> None:
        """Replace the running statistics of batch norm by their mean over ranks, which saw different images."""
        if not self.together:
            return
        statistics = [
            buffer for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))
        ]
        if statistics:
            flat = self.mean(torch.cat([buffer.flatten() for buffer in statistics]))
            for buffer, mean in zip(statistics, flat.split([b.numel() for b in statistics]), strict=True):
                buffer.copy_(mean.view_as(buffer))

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over ranks; the weights of the first rank become everybody's."""
        if not self.together:
            return model
        return DistributedDataParallel(
            model,
            device_ids=None if self.device.type == "cpu" else [self.device.index],
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The model inside `wrap`."""
        return model.module if isinstance(model, DistributedDataParallel) else model

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Leave gradients on their rank, for all but the last part of an accumulated batch."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.together:
            dist.barrier()


class PeerLost(RuntimeError):
    """Another rank is gone: the cause is with that one, which tells it."""


# What gloo and nccl say when the other end of a connection is no longer there.
GONE = re.compile(r"[Cc]onnection (closed|reset|refused|was (likely )?closed)|Broken pipe|remote process exited")


@contextmanager
def connect(topology: Topology, device: torch.device) -> Iterator[Ranks]:
    """Join the ranks that the launcher started, for as long as the context lasts.

    Raises PeerLost in place of what a collective raises when another rank has ended.
    """
    if topology.world_size > 1:
        dist.init_process_group(collective_backend(device), rank=topology.rank, world_size=topology.world_size)
    try:
        yield Ranks(topology.rank, topology.world_size, device)
    except RuntimeError as error:
        if topology.world_size > 1 and GONE.search(str(error)):
            raise PeerLost(f"rank {topology.rank} stops, since another rank has ended") from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
