"""Process group of a run and its collectives. The only module that imports torch.distributed."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from detection.config.settings import InputError, RankInfo
from detection.runtime import sync_batch_norm
from detection.runtime.device import collective_backend

T = TypeVar("T")

# Keep batch norm statistics local between evaluations. torch renamed this parameter.
NO_BUFFER_BROADCAST: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)

GRAD_COMPRESS_HOOKS = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}


@dataclass(frozen=True)
class DistContext:
    """Rank of this process and its collectives. A run has one process per accelerator."""

    rank: int
    world_size: int
    device: torch.device
    node: int = 0

    @property
    def is_main(self) -> bool:
        """True on the rank that writes logs and files."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """True if the run has several ranks."""
        return self.world_size > 1

    def all_reduce_mean(self, tensor: Tensor) -> Tensor:
        """Average a floating-point tensor over ranks, in place."""
        if self.is_distributed:
            dist.all_reduce(tensor)
            tensor /= self.world_size
        return tensor

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """Take the elementwise maximum of a tensor over ranks, in place."""
        if self.is_distributed:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """Return the first rank's value on every rank. The value must be picklable."""
        values = [value]
        if self.is_distributed:
            dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def broadcast_in_node(self, value: T) -> T:
        """Return the value of the first rank on this node. The value must be picklable."""
        values = [(self.node, value)]
        if self.is_distributed:
            values = [(self.node, value)] * self.world_size
            dist.all_gather_object(values, (self.node, value))
        return next(other for node, other in values if node == self.node)

    @torch.inference_mode(False)  # gloo in torch 2.4 writes the rows in another thread, which that mode forbids
    def all_gather_rows(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks, (N_0 + N_1 + ..., C), in the order of ranks. Each rank gives (N_rank, C)."""
        if not self.is_distributed:
            return rows
        counts = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=self.device))
        max_rows = int(torch.cat(counts).max())
        padded = rows.new_zeros(max_rows, rows.shape[1])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])

    @torch.inference_mode(False)  # as above
    def gather_objects(self, value: T) -> list[T]:
        """Return the values of all ranks in order on the first rank, and [] on the others. Values must be picklable."""
        if not self.is_distributed:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.gather_object(value, values if self.is_main else None)
        return values if self.is_main else []

    def average_running_stats(self, model: nn.Module) -> None:
        """Average the running statistics of batch norm over ranks, since each rank trains on different images."""
        if self.is_distributed:
            sync_batch_norm.set_running_stats(model, self.all_reduce_mean(sync_batch_norm.running_stats(model)))

    def convert_sync_batchnorm(self, model: nn.Module, group_size: int) -> nn.Module:
        """Return the model with batch norm over groups of `group_size` ranks, which must divide the world size."""
        if group_size == 1 or not self.is_distributed:
            return model
        group, _ = dist.new_subgroups(group_size) if group_size < self.world_size else (None, None)
        if self.device.type != "cpu":
            return nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group=group)
        return sync_batch_norm.convert_cpu_sync_batchnorm(model, partial(dist.all_reduce, group=group))

    def wrap_ddp(self, model: nn.Module, gradient_dtype: str = "fp32", *, force: bool = False) -> nn.Module:
        """Return the model in DistributedDataParallel, with the weights of the first rank on all ranks.

        gradient_dtype: data type in which gradients are sent and summed: fp32, bf16 or fp16. force: also wrap with a
        single rank, to measure the overhead.
        """
        if not (self.is_distributed or force):
            return model
        ddp = DistributedDataParallel(
            model,
            device_ids=None if self.device.type == "cpu" else [self.device.index],
            **NO_BUFFER_BROADCAST,
            gradient_as_bucket_view=True,
        )
        if gradient_dtype != "fp32":
            ddp.register_comm_hook(None, GRAD_COMPRESS_HOOKS[gradient_dtype])
        return ddp

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return the model inside `wrap_ddp`."""
        return model.module if isinstance(model, DistributedDataParallel) else model

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Skip the all-reduce of gradients, for all but the last micro-batch of a batch."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.is_distributed:
            dist.barrier()


def resolve_backend(device: torch.device) -> str:
    """Return the collective backend for a device: the known one, or the one that the device's package registered.

    Raises InputError if this build of torch has none.
    """
    name = collective_backend(device) or dist.Backend.default_device_backend_map.get(device.type)
    if name is None or not dist.is_backend_available(name):
        raise InputError(
            f"--device {device.type}: this build of torch {torch.__version__} has no {name or 'collective'} backend "
            "to connect ranks. Install the vendor's, or train with DGXNGPU=1 and DGXNNODES=1."
        )
    return name


class PeerDisconnected(RuntimeError):
    """Loss of another rank, which reports the cause itself."""


# Error messages of gloo and nccl after a peer disconnected.
DISCONNECT_PATTERN = re.compile(
    r"[Cc]onnection (closed|reset|refused|timed out|was (likely )?closed)|Broken pipe|remote process exit(ed|ing)|"
    r"[Tt]imed out|No route to host|unreachable|NCCL communicator was aborted|NCCL timeout"
)


@contextmanager
def init_process_group(
    rank_info: RankInfo, device: torch.device, *, timeout_s: float, force: bool = False
) -> Iterator[DistContext]:
    """Join the process group of the launcher for the duration of the context.

    force: create a group for a single rank, too, as `wrap_ddp(force=True)` requires. Raises PeerDisconnected if a
    collective fails because another rank ended or did not respond within `timeout_s`.
    """
    if rank_info.world_size > 1 or force:
        timeout = timedelta(seconds=timeout_s)
        store, rank, world_size = next(rendezvous("env://", rank_info.rank, rank_info.world_size, timeout=timeout))
        # After a restart, torchrun reuses the store, which still holds the addresses of the previous ranks.
        # All launchers have the same restart count: if a rank ends, the ranks of all nodes restart.
        store = dist.PrefixStore(f"restart_{rank_info.num_restarts}", store)  # type: ignore[attr-defined]
        dist.init_process_group(resolve_backend(device), store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        yield DistContext(rank_info.rank, rank_info.world_size, device, rank_info.rank // rank_info.local_world_size)
    except RuntimeError as error:
        if rank_info.world_size > 1 and DISCONNECT_PATTERN.search(str(error)):
            raise PeerDisconnected(f"rank {rank_info.rank} stopped: another rank ended or is unreachable") from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
