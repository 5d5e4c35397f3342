"""Cost of the gradient all-reduce: bytes on the wire, and overhead of DDP.

    python -m detection.runtime.launch --nproc-per-node 2 -m perf.scaling.gradient [--batch-size 2] [--rounds 9]

On one rank this compares a step with DistributedDataParallel to one without. On several ranks it interleaves steps that
all-reduce their gradient, steps that keep it, and the all-reduce alone. The bytes are those that the kernel counts on
the TCP connections of this process, which include all traffic between ranks. gloo uses TCP. With other collectives they
are 0.
"""

import argparse
import json
import os
import socket
import statistics
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from detection.config.settings import read_rank_info, report_errors
from detection.data.batch import RankBatch
from detection.data.prefetch import to_device
from detection.engine import entrypoint, train_loop
from detection.engine.initialization import build_state
from detection.engine.state import TrainState
from detection.runtime.device import select_device
from detection.runtime.distributed import DistContext, init_process_group
from perf.machine import LoadMeter, machine, own_cpu_s
from perf.table import align, caption
from perf.timing import Variant, quartiles, time_calls
from ssd.config import Config
from ssd.evaluator import SSDEvaluator
from ssd.model import SSD300
from ssd.train import make_workload

# Offset of tcpi_bytes_received in the kernel's struct tcp_info, since Linux 4.1.
TCP_INFO_BYTES, RECEIVED_AT = 256, 128

NO_DDP, DDP, NO_SYNC = "without DDP", "DDP", "DDP, gradient kept"
BF16, ALL_REDUCE = "DDP, gradient in bf16", "all-reduce alone"


@report_errors
def main(argv: list[str]) -> int:
    """Measure on all ranks, print and write on the main rank, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.scaling.gradient",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch-size", type=int, default=2, help="images per rank")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each kind")
    parser.add_argument("--out", type=Path, help="a .json file for the results")
    arguments = parser.parse_args(argv)
    rank_info = read_rank_info()
    config = Config(batch_size=arguments.batch_size, seed=0, compile="off")
    device = select_device("auto", rank_info.local_rank)
    with init_process_group(rank_info, device, timeout_s=600, force=True) as ranks:
        load_meter, start_s = LoadMeter(), own_cpu_s()
        results = measure(config, ranks, arguments.rounds)
        all_ranks_s = ranks.world_size * ranks.all_reduce_mean(torch.tensor([own_cpu_s() - start_s], device=device))
        load = load_meter.read(all_ranks_s.item())
    if ranks.is_main:
        record = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(device), "load": load, **results}
        print(format_result(record))
        if arguments.out:
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def measure(config: Config, ranks: DistContext, rounds: int) -> dict[str, Any]:
    """Return times and received bytes of each kind of step, and the ratios derived from them."""
    local, fp32_ddp, bf16_ddp = (make_step(config, ranks.device) for _ in range(3))
    fp32_ddp.state.model = ranks.wrap_ddp(fp32_ddp.state.model, force=True)
    bf16_ddp.state.model = ranks.wrap_ddp(bf16_ddp.state.model, "bf16", force=True)
    gradient = torch.zeros(sum(p.numel() for p in local.state.model.parameters()), device=ranks.device)

    def step_without_sync() -> None:
        with ranks.no_sync(fp32_ddp.state.model):
            fp32_ddp.run()

    kinds: dict[str, Callable[[], object]] = {
        NO_DDP: local.run,
        DDP: fp32_ddp.run,
        NO_SYNC: step_without_sync,
        BF16: bf16_ddp.run,
        ALL_REDUCE: lambda: ranks.all_reduce_mean(gradient),
    }
    samples = interleave(kinds, ranks, rounds)
    times_s = {name: [time_s for time_s, _ in kind_samples] for name, kind_samples in samples.items()}
    received = {name: statistics.mean(size for _, size in kind_samples) for name, kind_samples in samples.items()}
    return {
        "ranks": ranks.world_size,
        "batch_size": config.batch_size,
        "precision": local.state.precision.name,
        "gradient_bytes": gradient.nbytes,
        "n": rounds,
        "time_s": {name: asdict(quartiles(values)) for name, values in times_s.items()},
        "received_bytes": received,
        **ratios(times_s, received, gradient.nbytes, ranks.world_size),
    }


class TrainStep(NamedTuple):
    """Training step of SSD300 on a dummy batch, and its state."""

    state: TrainState
    run: Callable[[], object]


def make_step(config: Config, device: torch.device) -> TrainStep:
    """Return a training step on this rank alone. It uses DDP once the model of its state is wrapped."""
    torch.manual_seed(0)
    single_rank = DistContext(0, 1, device)
    evaluator = SSDEvaluator(config, single_rank)
    workload = make_workload(config, single_rank, 0, SSD300(config.num_classes), evaluator)
    state = build_state(workload, config, single_rank)
    rank_batch = to_device(RankBatch(workload.dummy_batch(), config.batch_size, 1 / config.batch_size), device)
    return TrainStep(state, partial(train_loop.train_step, state, rank_batch, workload, config, single_rank))


def interleave(
    kinds: dict[str, Callable[[], object]], ranks: DistContext, rounds: int
) -> dict[str, list[tuple[float, int]]]:
    """Return time on the slowest rank and bytes received by this rank, of each kind of step in each round.

    The first round is left out. All ranks run the same steps. Unlike in `perf.timing.interleave`, no rank decides by
    its own clock.
    """
    samples: dict[str, list[tuple[float, int]]] = {name: [] for name in kinds}
    for round_index in range(rounds + 1):
        for name, step in kinds.items():
            ranks.barrier()
            before = received_bytes()
            local_s = time_calls(Variant(name, step), 1, ranks.device)
            received = received_bytes() - before
            max_s = ranks.all_reduce_max(torch.tensor([local_s], device=ranks.device)).item()
            if round_index:
                samples[name].append((max_s, received))
    return samples


def ratios(
    times_s: dict[str, list[float]], received: dict[str, float], gradient_bytes: int, world_size: int
) -> dict[str, Any]:
    """Return the cost of DDP, round by round, and the received bytes relative to the ideal.

    The cost is that of DDP itself, on several ranks from steps without an all-reduce. The ideal is a ring, in which
    each rank receives 2(n-1)/n of one gradient.
    """
    with_ddp = times_s[NO_SYNC if world_size > 1 else DDP]
    cost = quartiles([ddp_s / local_s for ddp_s, local_s in zip(with_ddp, times_s[NO_DDP], strict=True)])
    if not received[DDP]:
        return {"ddp_cost": asdict(cost)}
    ideal = 2 * (world_size - 1) / world_size * gradient_bytes
    bytes_of_ideal = {"fp32": received[DDP] / ideal, "bf16": received[BF16] / (ideal / 2)}
    return {"ddp_cost": asdict(cost), "bytes_of_ideal": bytes_of_ideal}


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
    """Return a table of the steps, and the ratios below it, without times if other processes were busy."""
    rows = [("step", "received", "median", "range")]
    for name, time_s in result["time_s"].items():
        median, low, high = (f"{1000 * time_s[key]:.1f}" for key in ("median", "min", "max"))
        rows.append((name, f"{result['received_bytes'][name] / 2**20:.1f} MiB", f"{median} ms", f"{low} to {high}"))
    cost, is_idle = result["ddp_cost"], result["load"]["is_idle"]
    lines = [
        f"{result['ranks']} × {result['batch_size']} images, {result['precision']}, {caption(result)}",
        f"gradient in fp32: {result['gradient_bytes'] / 2**20:.1f} MiB",
        align(rows if is_idle else [row[:2] for row in rows]),
    ]
    if is_idle:
        lines.append(f"DDP: {cost['median']:.3f} of the time without ({cost['q1']:.3f} to {cost['q3']:.3f})")
    for name, ratio in result.get("bytes_of_ideal", {}).items():
        lines.append(f"{name}: {ratio:.4f} of the bytes of a ring all-reduce of one gradient in {name}")
    return "\n".join(lines)


if __name__ == "__main__":
    entrypoint.hard_exit(main(sys.argv[1:]))
