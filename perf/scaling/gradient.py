"""Cost of the gradient all-reduce: bytes on the wire, time hidden behind the backward pass, and overhead of DDP.

    python -m detection.runtime.launch --nproc-per-node 2 -m perf.scaling.gradient [--batch-size 2] [--rounds 9]

On one rank this compares a step with DistributedDataParallel to one without. On several ranks it interleaves steps that
all-reduce their gradient, steps that keep it, and the all-reduce alone. The bytes are those that the kernel counts on
the TCP connections of this process, which includes all traffic between ranks. They are 0 if the collectives do not use
TCP. gloo does.
"""

import argparse
import json
import os
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detection.config.settings import InputError, read_rank_info
from detection.data.batch import RankBatch
from detection.data.prefetch import to_device
from detection.engine import entrypoint, train_loop
from detection.engine.initialization import build_state
from detection.runtime.device import select_device
from detection.runtime.distributed import DistContext, init_process_group
from perf.machine import machine
from perf.table import align
from perf.timing import Variant, quartiles, time_calls
from ssd.config import Config
from ssd.evaluator import SSDEvaluator
from ssd.model import SSD300
from ssd.train import make_workload

# Offset of tcpi_bytes_received in the kernel's struct tcp_info, since Linux 4.1.
TCP_INFO_BYTES, RECEIVED_AT = 256, 128

NO_DDP, DDP, NO_SYNC = "without DDP", "DDP", "DDP, gradient kept"
BF16, ALL_REDUCE = "DDP, gradient in bf16", "all-reduce alone"


def main(argv: list[str]) -> int:
    """Measure on all ranks, print and write on the main rank, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.scaling.gradient",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch-size", type=int, default=2, help="images per rank")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each kind")
    parser.add_argument("--precision", default="auto", help="precision of the network, as in a run")
    parser.add_argument("--out", type=Path, help="a .json file for the results")
    arguments = parser.parse_args(argv)
    rank_info = read_rank_info()
    try:
        config = Config(batch_size=arguments.batch_size, precision=arguments.precision, seed=0, compile="off")
        device = select_device("auto", rank_info.local_rank)
        with init_process_group(rank_info, device, timeout_s=600, force=True) as ranks:
            result = measure(config, ranks, arguments.rounds)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if ranks.is_main:
        print(format_result(result))
        if arguments.out:
            record = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(device), **result}
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def measure(config: Config, ranks: DistContext, rounds: int) -> dict[str, Any]:
    """Return times and received bytes of each kind of step, and the ratios derived from them."""
    local, fp32_ddp, bf16_ddp = (DdpProbe(config, ranks.device) for _ in range(3))
    fp32_ddp.state.model = ranks.wrap_ddp(fp32_ddp.state.model, force=True)
    bf16_ddp.state.model = ranks.wrap_ddp(bf16_ddp.state.model, "bf16", force=True)
    gradient = torch.zeros(sum(p.numel() for p in local.state.model.parameters()), device=ranks.device)

    def step_without_sync() -> None:
        with ranks.no_sync(fp32_ddp.state.model):
            fp32_ddp.step()

    kinds: dict[str, tuple[Callable[[], object], DdpProbe]] = {
        NO_DDP: (local.step, local),
        DDP: (fp32_ddp.step, fp32_ddp),
        NO_SYNC: (step_without_sync, fp32_ddp),
        BF16: (bf16_ddp.step, bf16_ddp),
        ALL_REDUCE: (lambda: ranks.all_reduce_mean(gradient), local),
    }
    samples = interleave(kinds, ranks, rounds)
    return {
        "ranks": ranks.world_size,
        "batch_size": config.batch_size,
        "precision": local.state.precision.name,
        "gradient_bytes": gradient.nbytes,
        "kinds": {
            name: {
                "time_s": asdict(quartiles([one.time_s for one in kind_samples])),
                "after_backward_s": asdict(quartiles([one.after_backward_s for one in kind_samples])),
                "received_bytes": statistics.mean(one.received_bytes for one in kind_samples),
            }
            for name, kind_samples in samples.items()
        },
        **summarize(samples, gradient.nbytes, ranks),
    }


class DdpProbe:
    """Training of SSD300 on a dummy batch, with timestamps of its last gradient and its optimizer step."""

    def __init__(self, config: Config, device: torch.device):
        torch.manual_seed(0)
        self.config, self.single_rank = config, DistContext(0, 1, device)
        evaluator = SSDEvaluator(config, self.single_rank)
        self.workload = make_workload(config, self.single_rank, 0, SSD300(config.num_classes), evaluator)
        self.state = build_state(self.workload, config, self.single_rank)
        rank_batch = RankBatch(self.workload.dummy_batch(), config.batch_size, 1 / config.batch_size)
        self.rank_batch = to_device(rank_batch, device)
        self.last_gradient_s = self.optimizer_s = 0.0
        for parameter in self.state.model.parameters():
            parameter.register_post_accumulate_grad_hook(self.on_gradient)
        self.state.optimizer.register_step_pre_hook(self.on_optimizer_step)

    def step(self) -> None:
        """Run one training step."""
        train_loop.train_step(self.state, self.rank_batch, 0.0, self.workload, self.config, self.single_rank)

    def on_gradient(self, _: Tensor) -> None:
        """Store the time at which a gradient is complete."""
        self.last_gradient_s = time.perf_counter()

    def on_optimizer_step(self, *_: object) -> None:
        """Store the time at which all gradients are reduced."""
        self.optimizer_s = time.perf_counter()


class Sample(NamedTuple):
    """Measurement of one step.

    time_s: on the slowest rank. after_backward_s: from the last gradient to the optimizer step, on the rank that
    finishes its backward pass last and so waits for no other. received_bytes: by this rank.
    """

    time_s: float
    after_backward_s: float
    received_bytes: int


def interleave(
    kinds: dict[str, tuple[Callable[[], object], DdpProbe]], ranks: DistContext, rounds: int
) -> dict[str, list[Sample]]:
    """Return a sample of each kind of step in each round, without the first round.

    All ranks run the same steps. Unlike in `perf.timing.interleave`, no rank decides by its own clock.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in kinds}
    for round_index in range(rounds + 1):
        for name, (step, probe) in kinds.items():
            ranks.barrier()
            before = received_bytes()
            local_s = time_calls(Variant(name, step), 1, ranks.device)
            received = received_bytes() - before
            after_s = probe.optimizer_s - probe.last_gradient_s
            max_s, negative_min_s = ranks.all_reduce_max(
                torch.tensor([local_s, -after_s], device=ranks.device)
            ).tolist()
            if round_index:
                samples[name].append(Sample(max_s, -negative_min_s, received))
    return samples


def summarize(samples: dict[str, list[Sample]], gradient_bytes: int, ranks: DistContext) -> dict[str, Any]:
    """Return ratios per round: cost of DDP, hidden fraction of the all-reduce, and bytes relative to the ideal.

    The cost is that of DDP itself, on several ranks from steps without an all-reduce. The hidden fraction is the part
    of the all-reduce that does not extend beyond the backward pass. On an accelerator it is unknown, since the host
    finishes earlier. The ideal is a ring, in which each rank receives 2(n-1)/n of one gradient.
    """
    fp32, no_sync, bf16, all_reduce = (samples[name] for name in (DDP, NO_SYNC, BF16, ALL_REDUCE))
    with_ddp = no_sync if ranks.is_distributed else fp32
    costs = [one.time_s / other.time_s for one, other in zip(with_ddp, samples[NO_DDP], strict=True)]
    summary: dict[str, Any] = {"ddp_cost": asdict(quartiles(costs))}
    if not ranks.is_distributed:
        return summary
    if ranks.device.type == "cpu":
        rows = zip(fp32, no_sync, all_reduce, strict=True)
        hidden = [1 - (f.after_backward_s - n.after_backward_s) / a.time_s for f, n, a in rows]
        summary["hidden_fraction"] = asdict(quartiles(hidden))
    if any(one.received_bytes for one in fp32):
        ideal = 2 * (ranks.world_size - 1) / ranks.world_size * gradient_bytes
        summary["bytes_of_ideal"] = {
            "fp32": statistics.mean(one.received_bytes for one in fp32) / ideal,
            "bf16": statistics.mean(one.received_bytes for one in bf16) / (ideal / 2),
        }
    return summary


def received_bytes() -> int:
    """Return the bytes that this process has received on its open TCP connections."""
    total = 0
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed in the meantime
            if not os.readlink(path).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(path.name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
                    total += struct.unpack_from("=Q", info, RECEIVED_AT)[0]
    return total


def format_result(result: dict[str, Any]) -> str:
    """Return a table of the steps, and the ratios below it."""
    rows = [("a step", "median", "range", "after the backward pass", "received")]
    for name, kind in result["kinds"].items():
        time_s, after_s = kind["time_s"], kind["after_backward_s"]
        rows.append(
            (
                name,
                f"{1000 * time_s['median']:.1f} ms",
                f"{1000 * time_s['min']:.1f} to {1000 * time_s['max']:.1f}",
                "" if name == ALL_REDUCE else f"{1000 * after_s['median']:.1f} ms",
                f"{kind['received_bytes'] / 2**20:.1f} MiB",
            )
        )
    world_size, batch_size = result["ranks"], result["batch_size"]
    lines = [
        f"{world_size} rank{'s' * (world_size > 1)} × {batch_size} images, {result['precision']}, n = {time_s['n']}; "
        f"a gradient is {result['gradient_bytes'] / 2**20:.1f} MiB in fp32",
        align(rows),
        f"DDP: {result['ddp_cost']['median']:.3f} of the time without "
        f"({result['ddp_cost']['q1']:.3f} to {result['ddp_cost']['q3']:.3f})",
    ]
    if hidden := result.get("hidden_fraction"):
        low, high = 100 * hidden["q1"], 100 * hidden["q3"]
        lines.append(f"hidden behind the backward pass: {100 * hidden['median']:.0f}% ({low:.0f} to {high:.0f})")
    for name, ratio in result.get("bytes_of_ideal", {}).items():
        lines.append(f"{name}: {ratio:.4f} of the bytes of a ring all-reduce of one gradient in {name}")
    return "\n".join(lines)


if __name__ == "__main__":
    entrypoint.hard_exit(main(sys.argv[1:]))
