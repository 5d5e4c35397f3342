"""The ranks of a run: who they are and how they speak to each other. The only module that imports torch.distributed."""

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

from detection.config.settings import InputError, Topology
from detection.runtime import sync_batch_norm
from detection.runtime.device import collective_backend

T = TypeVar("T")

# Batch norm's statistics stay on their rank between evaluations; torch has renamed how to say so.
BUFFERS_STAY: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)

COMPRESS = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of a run: one per accelerator, or one alone."""

    rank: int
    world_size: int
    device: torch.device
    node: int = 0

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

    def greatest(self, tensor: Tensor) -> Tensor:
        """Greatest over ranks of each element of a tensor, in place."""
        if self.together:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """The first rank's value, on every rank; anything that pickles."""
        box = [value]
        if self.together:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def from_node(self, value: T) -> T:
        """The value of the first rank on this rank's node; anything that pickles."""
        values = [(self.node, value)]
        if self.together:
            values = [(self.node, value)] * self.world_size
            dist.all_gather_object(values, (self.node, value))
        return next(theirs for node, theirs in values if node == self.node)

    @torch.inference_mode(False)  # gloo of torch 2.4 fills the rows on a thread of its own, which that mode forbids
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

    @torch.inference_mode(False)  # as above
    def gather(self, value: T) -> list[T]:
        """The values of all ranks in their order, on the first rank; none on the others. Anything that pickles."""
        if not self.together:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.gather_object(value, values if self.is_first else None)
        return values if self.is_first else []

    def average_batch_norm(self, model: nn.Module) -> None:
        """Replace the running statistics of batch norm by their mean over ranks, which saw different images."""
        if self.together:
            sync_batch_norm.set_statistics(model, self.mean(sync_batch_norm.statistics(model)))

    def share_batch_norm(self, model: nn.Module, span: int) -> nn.Module:
        """The model with batch norm over the images of groups of `span` ranks, which divides their number."""
        if span == 1 or not self.together:
            return model
        group, _ = dist.new_subgroups(span) if span < self.world_size else (None, None)
        if self.device.type != "cpu":
            return nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group=group)
        return sync_batch_norm.convert(model, partial(dist.all_reduce, group=group))

    def wrap(self, model: nn.Module, gradient_dtype: str = "fp32", *, even_alone: bool = False) -> nn.Module:
        """The model with gradients averaged over ranks; the weights of the first rank become everybody's.

        gradient_dtype: what gradients travel in, fp32, bf16 or fp16; they are added up in it, too. even_alone: with
        one rank, too, to measure what that costs.
        """
        if not (self.together or even_alone):
            return model
        parallel = DistributedDataParallel(
            model,
            device_ids=None if self.device.type == "cpu" else [self.device.index],
            **BUFFERS_STAY,
            gradient_as_bucket_view=True,
        )
        if gradient_dtype != "fp32":
            parallel.register_comm_hook(None, COMPRESS[gradient_dtype])
        return parallel

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


def backend_of(device: torch.device) -> str:
    """The library of collectives for a device: the one that is known, or that the device's own package has registered.

    Raises InputError where this torch has none, so that each rank can only be alone.
    """
    name = collective_backend(device) or dist.Backend.default_device_backend_map.get(device.type)
    if name is None or not dist.is_backend_available(name):
        raise InputError(
            f"--device {device.type}: ranks cannot speak to each other, since torch {torch.__version__} has no "
            f"{name or 'library of collectives'} here. Install the vendor's, or train with DGXNGPU=1 and DGXNNODES=1."
        )
    return name


class PeerLost(RuntimeError):
    """Another rank is gone: the cause is with that one, which tells it."""


# What gloo and nccl say when the other end of a connection is no longer there.
GONE = re.compile(
    r"[Cc]onnection (closed|reset|refused|timed out|was (likely )?closed)|Broken pipe|remote process exit(ed|ing)|"
    r"[Tt]imed out|No route to host|unreachable|NCCL communicator was aborted|NCCL timeout"
)


@contextmanager
def connect(topology: Topology, device: torch.device, *, timeout_s: float, even_alone: bool = False) -> Iterator[Ranks]:
    """Join the ranks that the launcher started, for as long as the context lasts.

    even_alone: a rank that is alone makes a group of one, as `wrap` needs then. Raises PeerLost in place of what a
    collective raises when another rank has ended, or does not come within `timeout_s`.
    """
    if topology.world_size > 1 or even_alone:
        timeout = timedelta(seconds=timeout_s)
        store, rank, world_size = next(rendezvous("env://", topology.rank, topology.world_size, timeout=timeout))
        # torchrun hands the ranks that it starts again the same store, in which the addresses of those before them
        # still are. Every launcher has counted alike: a rank that ends takes those of all nodes along.
        store = dist.PrefixStore(f"restart_{topology.restarts}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend_of(device), store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        yield Ranks(topology.rank, topology.world_size, device, topology.rank // topology.local_world_size)
    except RuntimeError as error:
        if topology.world_size > 1 and GONE.search(str(error)):
            raise PeerLost(f"rank {topology.rank} stops, since another rank has ended or cannot be reached") from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
