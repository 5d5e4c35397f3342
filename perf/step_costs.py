"""Costs of a training step that are known without an accelerator, for each config file of one.

    python -m perf.step_costs [SYSTEM ...] [--page FILE]

Runs two steps at the real batch on a fake CUDA device, which computes nothing, and reports those of the second one:
peak memory, operations, host synchronizations, and changes of the memory layout. --page: Markdown page whose table
`step costs` is updated.

Memory is that of tensors in eager mode. The driver, cuDNN's workspaces and fragmentation come on top, and compiled code
needs less. An operation is at least one kernel launch.
"""

import argparse
import sys
import weakref
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from detection.config.run_config import RunConfig
from detection.config.settings import InputError, report_errors
from detection.data.batch import RankBatch
from detection.data.prefetch import to_device
from detection.engine import optim, train_loop
from detection.engine.initialization import build_state
from detection.runtime.distributed import DistContext
from mlperf import stdio
from perf.fake_cuda import CUDA, DUMMY_ROWS, calling_function, fake_cuda_device, tensors
from perf.page import markdown, update_table
from perf.systems import COMMANDS, benchmark_of, exported, list_systems, load_config

TABLE = "step costs"
# Memory of an accelerator of each system, in units of 10^9 bytes. None: a CPU, or any device.
CARDS: dict[str, tuple[str, float]] = {
    "BI-V100_1x8": ("BI-V100", 32),
    "DGX1": ("V100", 32),
    "DGX1_maskrcnn": ("V100", 32),
    "DGXA100": ("A100", 40),
    "DGXA100_maskrcnn": ("A100", 40),
    "DGXA100_multi_2x8x56": ("A100", 40),
    "DGXA100_retinanet": ("A100", 80),
    "DGXH100_retinanet": ("H100", 80),
    "H200": ("H200", 141),
    "H200_maskrcnn": ("H200", 141),
    "H200_retinanet": ("H200", 141),
    "MLU370_1x1": ("MLU370-S4", 24),
    "MLU370_1x4": ("MLU370-S4", 24),
    "NF5488": ("A100", 40),
    "SSD300v1.1_A100": ("A100", 40),
    "SSD300v1.1_V100": ("V100", 32),
    "V100_1x8": ("V100", 32),
}
METADATA_OPS = {"aten::detach", "aten::alias", "aten::lift_fresh", "aten::_unsafe_view", "aten::_reshape_alias"}
ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
COPIES = {"aten::clone", "aten::copy_", "aten::_to_copy"}


class StepCosts(NamedTuple):
    """Costs of a step. Bytes are of the device. syncs, layout_changes: by function of the program and operation."""

    weight_bytes: int
    state_bytes: int
    peak_bytes: int
    operations: int
    syncs: dict[tuple[str, str], int]
    layout_changes: dict[str, int]


class DeviceMonitor(TorchDispatchMode):
    """Live and peak bytes of tensors on the device, number of operations, and changes of the memory layout."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = self.operations = 0
        self.layout_changes: Counter[str] = Counter()
        self.storages: set[int] = set()

    def restart(self) -> None:
        """Reset the counts, except for memory that is still in use."""
        self.peak_bytes, self.operations = self.live_bytes, 0
        self.layout_changes.clear()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        on_device = [tensor for tensor in tensors(result) if tensor.device == CUDA]
        for tensor in on_device:
            self.track(tensor)
        name = operator._schema.name
        is_launch = not operator.is_view and name not in METADATA_OPS | ALLOCATIONS
        if is_launch and (on_device or any(tensor.device == CUDA for tensor in tensors(args))):
            self.operations += 1
        if name in COPIES and changes_layout(args[1] if name == "aten::copy_" else args[0], result):
            self.layout_changes[calling_function()] += 1
        return result

    def track(self, tensor: Tensor) -> None:
        """Count the memory of a tensor until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.storages:
            return
        self.storages.add(key)
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self.free, key, storage.nbytes())

    def free(self, key: int, num_bytes: int) -> None:
        """Subtract the memory of a freed tensor."""
        self.storages.discard(key)
        self.live_bytes -= num_bytes


def changes_layout(source: Tensor, target: Tensor) -> bool:
    """Return whether a copy of images or features (B, C, H, W) on the device changes between the memory layouts."""
    if source.dim() != 4 or source.shape != target.shape or {source.device, target.device} != {CUDA}:
        return False
    if not source.is_floating_point():
        return False
    layouts = [
        tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
        for tensor in (source, target)
    ]
    is_distinct = source.shape[1] > 1 and source.shape[2] * source.shape[3] > 1
    return is_distinct and layouts[0] != layouts[1]


def count_step(benchmark: str, config: RunConfig, *, dummy_rows: int = DUMMY_ROWS) -> StepCosts:
    """Return the costs of the second training step of a benchmark, in eager mode, on one rank.

    dummy_rows: regions with a mask, whose number depends on the data.
    """
    ranks = DistContext(0, 1, CUDA)
    with fake_cuda_device(dummy_rows) as syncs, DeviceMonitor() as monitor:
        workload = COMMANDS[benchmark].make_random_workload(config, ranks)
        state = build_state(workload, config, ranks)
        weight_bytes = sum(tensor.nbytes for tensor in state.model.state_dict().values())
        rank_batch = to_device(RankBatch(workload.dummy_batch(), config.batch_size, 1 / config.batch_size), CUDA)
        for step in range(2):
            optim.set_learning_rates(state.optimizer, partial(workload.lr_schedule, step, 1, 1))
            syncs.take()
            monitor.restart()
            train_loop.train_step(state, rank_batch, workload, config, ranks)
        state_bytes = sum(tensor.nbytes for values in state.optimizer.state.values() for tensor in tensors(values))
        return StepCosts(
            weight_bytes,
            state_bytes,
            monitor.peak_bytes,
            monitor.operations,
            syncs.take(),
            dict(monitor.layout_changes),
        )


@report_errors
def main(argv: list[str]) -> int:
    """Count, print and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.step_costs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "systems", metavar="SYSTEM", nargs="*", help="as in config_SYSTEM.sh; default: all accelerators"
    )
    parser.add_argument("--page", type=Path, help="Markdown page whose table is updated")
    arguments = parser.parse_args(argv)
    systems = arguments.systems or list(CARDS)
    if unknown := [system for system in systems if system not in list_systems()]:
        raise InputError(f"{', '.join(unknown)}: no config file. Choose from {', '.join(list_systems())}.")
    rows: list[tuple[str, ...]] = [HEADER]
    for system in systems:
        rows.append(describe(system))
        print("  ".join(rows[-1]), flush=True)
    if arguments.page:
        update_table(arguments.page, TABLE, markdown(rows))
    return 0


HEADER = ("system", "card", "batch", "weights, optimizer", "peak", "of the card", "operations", "host waits")


def describe(system: str) -> tuple[str, ...]:
    """Return a row of the table."""
    config = load_config(system, ("--device", "cuda", "--compile", "off"))
    micro_batch = config.batch_size // config.grad_accum_steps
    costs = count_step(benchmark_of(system), config, dummy_rows=max_mask_regions(config))
    peak_bytes = costs.peak_bytes
    if int(exported(system)["DGXNGPU"]) > 1:
        peak_bytes += costs.weight_bytes  # of the gradients that are exchanged
    card, card_gb = CARDS.get(system, ("", 0))
    return (
        f"`{system}`",
        f"{card}, {card_gb:g} GB" if card else "",
        f"{config.batch_size}"
        + (f" = {config.grad_accum_steps} × {micro_batch}" if config.grad_accum_steps > 1 else ""),
        f"{(costs.weight_bytes + costs.state_bytes) / 1e9:.2f} GB",
        f"{peak_bytes / 1e9:.1f} GB",
        f"{100 * peak_bytes / (card_gb * 1e9):.0f}%" if card else "",
        f"{costs.operations:,}",
        f"{sum(costs.syncs.values())}",
    )


def max_mask_regions(config: RunConfig) -> int:
    """Return the most regions of a micro-batch with a mask, if the workload has masks."""
    sampled = getattr(config, "box_batch_size_per_image", 0) * getattr(config, "box_positive_fraction", 0.0)
    return max(DUMMY_ROWS, int(sampled) * config.batch_size // config.grad_accum_steps)


if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(main(sys.argv[1:]))
