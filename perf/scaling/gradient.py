"""What it costs to share one gradient: bytes on the wire, time beside the backward pass, and time at one rank.

    python -m detection.runtime.launch --nproc-per-node 2 -m perf.scaling.gradient [--batch-size 2] [--rounds 9] [--out FILE]

With one rank it compares a step with DistributedDataParallel to one without it; with several, steps that share their
gradient to steps that keep it and to the all-reduce alone, in turns. The bytes are those that the kernel counts on this
process's TCP connections, so that nothing is forgotten that the ranks say to each other; where the collectives do
not use TCP, as gloo does, there are none.
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
from detection.runtime.device import select_device
from detection.runtime.distributed import DistContext, init_process_group
from perf.machine import machine
from perf.table import align
from perf.timing import Variant, quartiles, time_calls
from ssd.config import Config
from ssd.evaluator import SSDEvaluator
from ssd.model import SSD300
from ssd.train import make_workload

# In the kernel's struct tcp_info, since Linux 4.1: tcpi_bytes_received.
TCP_INFO_BYTES, RECEIVED_AT = 256, 128

NO_DDP, DDP, KEPT = "without DDP", "DDP", "DDP, gradient kept"
ROUNDED, LOCAL = "DDP, gradient in bf16", "all-reduce alone"


def main(argv: list[str]) -> int:
    """Measure on this rank, the first writes; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.scaling.gradient",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch-size", type=int, default=2, help="images per rank")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each kind")
    parser.add_argument("--precision", default="auto", help="as in a run")
    parser.add_argument("--out", type=Path, help="a .json file for the figures")
    arguments = parser.parse_args(argv)
    topology = read_rank_info()
    try:
        config = Config(batch_size=arguments.batch_size, precision=arguments.precision, seed=0, compile="off")
        device = select_device("auto", topology.local_rank)
        with init_process_group(topology, device, timeout_s=600, force=True) as ranks:
            figures = measure(config, ranks, arguments.rounds)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if ranks.is_main:
        print(print_result(figures))
        if arguments.out:
            record = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(device), **figures}
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def measure(config: Config, ranks: DistContext, rounds: int) -> dict[str, Any]:
    """Times of the kinds of steps, in seconds, and bytes that came to this rank in each; what follows from both."""
    plain, shared, rounded = (DdpProbe(config, ranks.device) for _ in range(3))
    shared.state.model = ranks.wrap_ddp(shared.state.model, force=True)
    rounded.state.model = ranks.wrap_ddp(rounded.state.model, "bf16", force=True)
    gradient = torch.zeros(sum(p.numel() for p in plain.state.model.parameters()), device=ranks.device)

    def kept_step() -> None:
        with ranks.no_sync(shared.state.model):
            shared.step()

    kinds: dict[str, tuple[Callable[[], object], DdpProbe]] = {
        NO_DDP: (plain.step, plain),
        DDP: (shared.step, shared),
        KEPT: (kept_step, shared),
        ROUNDED: (rounded.step, rounded),
        LOCAL: (lambda: ranks.all_reduce_mean(gradient), plain),
    }
    samples = interleave(kinds, ranks, rounds)
    return {
        "ranks": ranks.world_size,
        "batch_size": config.batch_size,
        "precision": plain.state.precision.name,
        "gradient_bytes": gradient.nbytes,
        "kinds": {
            name: {
                "time_s": asdict(quartiles([one.time_s for one in of_kind])),
                "after_backward_s": asdict(quartiles([one.after_backward_s for one in of_kind])),
                "received_bytes": statistics.mean(one.received_bytes for one in of_kind),
            }
            for name, of_kind in samples.items()
        },
        **summarize(samples, gradient.nbytes, ranks),
    }


class DdpProbe:
    """SSD300 in training on a made-up batch, alone as yet; knows when its last backward pass was over."""

    def __init__(self, config: Config, device: torch.device):
        torch.manual_seed(0)
        self.config, self.alone = config, DistContext(0, 1, device)
        evaluation = SSDEvaluator(config, self.alone)
        self.benchmark = make_workload(config, self.alone, 0, SSD300(config.num_classes), evaluation)
        self.state = train_loop.build_state(self.benchmark, config, self.alone)
        share = RankBatch(self.benchmark.dummy_batch(), config.batch_size, 1 / config.batch_size)
        self.share = to_device(share, device)
        self.last_gradient_s = self.optimiser_s = 0.0
        for parameter in self.state.model.parameters():
            parameter.register_post_accumulate_grad_hook(self.on_gradient)
        self.state.optimizer.register_step_pre_hook(self.on_optimizer_step)

    def step(self) -> None:
        """One optimiser step."""
        train_loop.train_step(self.state, self.share, 0.0, self.benchmark, self.config, self.alone)

    def on_gradient(self, _: Tensor) -> None:
        """A gradient is computed."""
        self.last_gradient_s = time.perf_counter()

    def on_optimizer_step(self, *_: object) -> None:
        """All gradients have been shared."""
        self.optimiser_s = time.perf_counter()


class Sample(NamedTuple):
    """Of one step: its time on the slowest rank, and that between the last gradient and the optimiser on the rank that
    came last, which waits for no other; bytes that this rank received.
    """

    time_s: float
    after_backward_s: float
    received_bytes: int


def interleave(
    kinds: dict[str, tuple[Callable[[], object], DdpProbe]], ranks: DistContext, rounds: int
) -> dict[str, list[Sample]]:
    """A sample of each kind of step in each round, the first round left out.

    All ranks do the same at the same time: unlike in `perf.timing.in_turns`, no rank decides by its own clock.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in kinds}
    for number in range(rounds + 1):
        for name, (step, training) in kinds.items():
            ranks.barrier()
            before = received_bytes()
            mine_s = time_calls(Variant(name, step), 1, ranks.device)
            received = received_bytes() - before
            after_s = training.optimiser_s - training.last_gradient_s
            slowest_s, least = ranks.all_reduce_max(torch.tensor([mine_s, -after_s], device=ranks.device)).tolist()
            if number:
                samples[name].append(Sample(slowest_s, -least, received))
    return samples


def summarize(samples: dict[str, list[Sample]], gradient_bytes: int, ranks: DistContext) -> dict[str, Any]:
    """Ratios, round by round: cost of DDP, share of the all-reduce that is hidden; bytes against the ideal's.

    The cost is that of DDP itself: with several ranks, of steps that share nothing. Hidden is what does not come after
    the backward pass; an accelerator is still at work when its host is not, so that this is not known there. The ideal
    is a ring's: each rank receives 2(n-1)/n of one gradient.
    """
    shared, kept, rounded, alone = (samples[name] for name in (DDP, KEPT, ROUNDED, LOCAL))
    ours = kept if ranks.is_distributed else shared
    costs = [one.time_s / plain.time_s for one, plain in zip(ours, samples[NO_DDP], strict=True)]
    found: dict[str, Any] = {"ddp_cost": asdict(quartiles(costs))}
    if not ranks.is_distributed:
        return found
    if ranks.device.type == "cpu":
        rows = zip(shared, kept, alone, strict=True)
        hidden = [1 - (s.after_backward_s - k.after_backward_s) / a.time_s for s, k, a in rows]
        found["hidden_share"] = asdict(quartiles(hidden))
    if any(one.received_bytes for one in shared):
        ideal = 2 * (ranks.world_size - 1) / ranks.world_size * gradient_bytes
        found["bytes_of_ideal"] = {
            "fp32": statistics.mean(one.received_bytes for one in shared) / ideal,
            "bf16": statistics.mean(one.received_bytes for one in rounded) / (ideal / 2),
        }
    return found


def received_bytes() -> int:
    """Bytes that have come to this process on the TCP connections that it has now."""
    total = 0
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed by now
            if not os.readlink(path).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(path.name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
                    total += struct.unpack_from("=Q", info, RECEIVED_AT)[0]
    return total


def print_result(figures: dict[str, Any]) -> str:
    """The figures as a table, and what follows from them."""
    rows = [("a step", "median", "range", "after the backward pass", "received")]
    for name, kind in figures["kinds"].items():
        time_s, after_s = kind["time_s"], kind["after_backward_s"]
        rows.append(
            (
                name,
                f"{1000 * time_s['median']:.1f} ms",
                f"{1000 * time_s['min']:.1f} to {1000 * time_s['max']:.1f}",
                "" if name == LOCAL else f"{1000 * after_s['median']:.1f} ms",
                f"{kind['received_bytes'] / 2**20:.1f} MiB",
            )
        )
    count, size = figures["ranks"], figures["batch_size"]
    lines = [
        f"{count} rank{'s' * (count > 1)} × {size} images, {figures['precision']}, n = {time_s['n']}; "
        f"a gradient is {figures['gradient_bytes'] / 2**20:.1f} MiB in fp32",
        align(rows),
        f"DDP: {figures['ddp_cost']['median']:.3f} of the time without "
        f"({figures['ddp_cost']['q1']:.3f} to {figures['ddp_cost']['q3']:.3f})",
    ]
    if hidden := figures.get("hidden_share"):
        low, high = 100 * hidden["q1"], 100 * hidden["q3"]
        lines.append(f"hidden behind the backward pass: {100 * hidden['median']:.0f} % ({low:.0f} to {high:.0f})")
    for name, share in figures.get("bytes_of_ideal", {}).items():
        lines.append(f"{name}: {share:.4f} of the bytes of a ring all-reduce of one gradient in {name}")
    return "\n".join(lines)


if __name__ == "__main__":
    entrypoint.hard_exit(main(sys.argv[1:]))
