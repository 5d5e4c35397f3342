"""Checks of all machines of a run, with the results of every rank in one table.

`python -m detection.runtime.launch ... -m WORKLOAD inspect [--decode-all] [--name value ...]` takes the settings of a
run without starting it. --decode-all decodes all images instead of a sample. Each check is a function of measured
values and returns a `CheckResult`. The exit status is 2 if a check fails, else 0.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from detection.config.run_config import COCO_NUM_CLASSES, RunConfig
from detection.config.settings import InputError, LaunchLayout, RankInfo, read_rank_info, to_json
from detection.data import coco, coco2017, device_cache, image_io, num_classes
from detection.data.batch import RankBatch
from detection.data.coco import Split
from detection.data.coco2017 import PublishedSplit
from detection.data.image_file import ImageFile
from detection.data.image_headers import map_files
from detection.data.prefetch import to_device
from detection.engine import train_loop
from detection.engine.initialization import build_state
from detection.engine.workload import Workload
from detection.preflight import run_checks
from detection.preflight.check_result import CheckResult, format_table, terminal_columns
from detection.preflight.resources import MIB, check_machine, format_bytes
from detection.preflight.run_checks import PreflightSpec, batch_bytes
from detection.runtime import device, parent_process
from detection.runtime.distributed import DistContext, PeerDisconnected, init_process_group

Config = TypeVar("Config", bound=RunConfig)

NUM_SAMPLES = 4  # decoded images per split
ALL_REDUCE_BYTES = 64 * MIB
NUM_ROUNDS = 5
TIMEOUT_S = 600
DECODE_ALL, DECODE_ALL_TIMEOUT_S = "--decode-all", 24 * 3600
NODE_LOCAL_SETTINGS = ("data_dir", "log_dir", "run_dir", "pretrained_backbone")


@dataclass(frozen=True)
class StepProbe:
    """Training step on dummy input on a single rank: its time, peak memory so far, and gradient size."""

    step_s: float
    peak_gib: float
    gradient_bytes: int


def main(
    argv: Sequence[str], spec: PreflightSpec[Config], make_workload: Callable[[Config, DistContext], Workload[Any]]
) -> int:
    """Check as one of the launched ranks, print the table on the main rank, and return the exit status."""
    rank_info = RankInfo()
    decode_all = DECODE_ALL in argv
    try:
        config, rank_info = spec.load([word for word in argv if word != DECODE_ALL]).config, read_rank_info()
        if rank_info.has_launcher:
            parent_process.end_with_parent(rank_info.launcher_pid)
        device_result, torch_device = check_device(config.device, rank_info.local_rank)
        if device_result.status != "fail":
            device_cache.validate(config, torch_device)
        with init_process_group(
            rank_info, torch_device, timeout_s=DECODE_ALL_TIMEOUT_S if decode_all else TIMEOUT_S
        ) as ranks:
            results = [device_result, *check_rank(config, rank_info, spec, ranks, make_workload, decode_all=decode_all)]
            rank_results = ranks.gather_objects(results)
            failed = any(result.status == "fail" for results_of_rank in rank_results for result in results_of_rank)
            if ranks.is_main:
                print(format_table(rank_results, terminal_columns()), flush=True)
            return 2 if ranks.broadcast(failed) else 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except PeerDisconnected as error:
        print(f"error: rank {rank_info.rank}: {error}", file=sys.stderr)
        return 2


def check_rank(
    config: Config,
    rank_info: RankInfo,
    spec: PreflightSpec[Config],
    ranks: DistContext,
    make_workload: Callable[[Config, DistContext], Workload[Any]],
    *,
    decode_all: bool = False,
) -> list[CheckResult]:
    """Run the checks of one rank. The first rank of a machine also checks the machine."""
    results = [
        check_consistency(config, ranks),
        check_driver(device.read_driver_version(), ranks.device),
        check_clock(ranks),
    ]
    single_rank = DistContext(0, 1, ranks.device)
    workload = make_workload(with_num_classes(config), single_rank)
    parameter_bytes = sum(tensor.nbytes for tensor in workload.model.parameters())
    ranks.barrier()  # all ranks of a machine allocate memory at the same time, as in a run
    probe, step_results = check_step(workload, config, single_rank)
    results += step_results
    results.append(check_bandwidth(measure_all_reduce(ranks), probe, ranks.world_size))
    if ranks.is_main:
        results += check_rules(config, spec.rule_values(config, ranks.world_size), ranks.world_size)
    if rank_info.local_rank == 0:
        layout = LaunchLayout(num_nodes=rank_info.num_nodes, ranks_per_node=rank_info.local_world_size)
        results += check_data(config, layout, spec, decode_all=decode_all)
        results += check_machine(config, rank_info, batch_bytes(config, spec), parameter_bytes)
    return results


def check_device(name: str, local_rank: int) -> tuple[CheckResult, torch.device]:
    """Check the device of a rank. Returns the CPU if it is not available, so that the other checks can run."""
    try:
        torch_device = device.select_device(name, local_rank)
    except InputError as error:
        return CheckResult(
            "device", "fail", str(error), "Check that this build of torch supports the accelerator."
        ), torch.device("cpu")
    if torch_device.type == "cpu" and name == "auto" and device.accelerator_driver_loaded():
        message = "an accelerator driver is loaded, but torch finds no accelerator: this run would use the CPU"
        return CheckResult(
            "device", "warn", message, "Install the torch built for it (./setup.sh --help)."
        ), torch_device
    return CheckResult("device", "pass", device.device_name(torch_device)), torch_device


def with_num_classes(config: Config) -> Config:
    """Return the settings with their number of classes, or COCO's if the annotations cannot be read."""
    try:
        return num_classes.resolve_num_classes(config)
    except InputError:
        return replace(config, num_classes=COCO_NUM_CLASSES)


def check_consistency(config: RunConfig, ranks: DistContext) -> CheckResult:
    """Check that this rank has the same versions and settings as rank 0. Folder names may differ between machines."""
    local = json.loads(to_json(config)) | {"torch": torch.__version__, "Python": platform.python_version()}
    first: Mapping[str, object] = ranks.broadcast(local)
    differing = [name for name in local if name not in NODE_LOCAL_SETTINGS and local[name] != first[name]]
    if differing:
        message = "differs from rank 0: " + ", ".join(
            f"{name} {local[name]} instead of {first[name]}" for name in differing
        )
        return CheckResult(
            "versions", "fail", message, "Install the same versions on every node, and pass the same settings."
        )
    return CheckResult("versions", "pass", f"torch {local['torch']}, Python {local['Python']}, settings same as rank 0")


def check_rules(config: RunConfig, rule_values: Mapping[str, object], world_size: int) -> list[CheckResult]:
    """Check the settings against MLPerf's rules. `--dry-run` lists the verdict on each value."""
    notes, violations = run_checks.check_rules(config, rule_values, world_size)
    ruleset = f"MLPerf {config.ruleset} {config.division}"
    if violations:
        return [CheckResult("rules", "fail", *line.rsplit(". ", 1)) for line in violations]
    warnings = [line.removeprefix("warning: ") for line in notes if line.startswith("warning: ")]
    if warnings:
        return [
            CheckResult("rules", "warn", line, "The run will not be a valid result of that division.")
            for line in warnings
        ]
    if config.mode != "train":
        return [CheckResult("rules", "pass", notes[0])]
    return [CheckResult("rules", "pass", f"{ruleset} allows these settings; --dry-run lists each value")]


def check_driver(driver: device.DriverVersion, torch_device: torch.device) -> CheckResult:
    """Check that the driver supports torch's version. An older major version fails, an older minor version may work."""
    if torch_device.type == "cpu":
        return CheckResult("driver", "pass", "not needed on a CPU")
    if driver.built_for is None or driver.max_supported is None:
        return CheckResult("driver", "pass", f"{torch_device.type}: torch reports no versions")
    required, supported = (".".join(map(str, version)) for version in (driver.built_for, driver.max_supported))
    message = f"torch is built for {driver.kind} {required}, the driver supports up to {supported}"
    if driver.max_supported[0] < driver.built_for[0]:
        return CheckResult(
            "driver", "fail", message, f"Install a newer driver, or the torch for {driver.kind} {supported}."
        )
    if driver.max_supported < driver.built_for:
        hint = "The driver may lack newer functions. Update it."
        return CheckResult("driver", "warn", message, hint)
    return CheckResult("driver", "pass", message)


def check_clock(ranks: DistContext) -> CheckResult:
    """Measure the offset of this rank's clock from rank 0, as median of readings after barriers."""
    readings = []
    for _ in range(NUM_ROUNDS):
        ranks.barrier()
        readings.append(time.time())
    first: list[float] = ranks.broadcast(readings)
    return check_clock_skew(
        statistics.median(local - reference for local, reference in zip(readings, first, strict=True))
    )


def check_clock_skew(skew_s: float) -> CheckResult:
    """Check that a clock is close to rank 0's, so that logs of several machines can be compared."""
    message = f"at most {max(0.01, abs(skew_s)):.2f} s from rank 0"
    hint = "Synchronize the clocks of all nodes with NTP or chrony."
    if abs(skew_s) < 1:
        return CheckResult("clock", "pass", message)
    return CheckResult("clock", "warn" if abs(skew_s) < 60 else "fail", message, hint)


def check_step(
    workload: Workload[Any], config: RunConfig, single_rank: DistContext
) -> tuple[StepProbe | None, list[CheckResult]]:
    """Time a training step on dummy input and check its memory."""
    hint = "Pass a smaller --batch-size, or more --grad-accum-steps, which split it into micro-batches."
    batch_text = f"{config.batch_size} images"
    if config.grad_accum_steps > 1:
        batch_text += f" in {config.grad_accum_steps} micro-batches"
    try:
        probe = probe_step(workload, config, single_rank)
    except InputError as error:
        return None, [CheckResult("training step", "fail", str(error), "Change that setting.")]
    except (RuntimeError, MemoryError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        if isinstance(error, MemoryError) or device.is_out_of_memory(str(error)):
            return None, [CheckResult("training step", "fail", f"{batch_text} do not fit in memory: {lines[0]}", hint)]
        return None, [
            CheckResult("training step", "fail", lines[0], "Run `--mode bench-train` to see the whole error.")
        ]
    message = f"{batch_text} in {probe.step_s:.3g} s"
    cache_gib = config.image_cache_gib if config.image_cache == "device" else 0.0
    return probe, [
        CheckResult("training step", "pass", message),
        check_device_memory(probe, single_rank.device, cache_gib),
    ]


def probe_step(workload: Workload[Any], config: RunConfig, single_rank: DistContext) -> StepProbe:
    """Train two steps on dummy input at a learning rate of 0. Time the second one."""
    state = build_state(workload, config, single_rank)
    batch = to_device(RankBatch(workload.dummy_batch(), config.batch_size, 1 / config.batch_size), single_rank.device)
    for _ in range(2):  # the first one allocates memory and compiles
        start_s = time.monotonic()
        train_loop.train_step(state, batch, workload, config, single_rank)
        device.synchronize(single_rank.device)
    step_s = time.monotonic() - start_s
    gradient_bytes = sum(tensor.nbytes for tensor in state.model.parameters() if tensor.requires_grad)
    return StepProbe(
        step_s,
        device.peak_memory_gib(single_rank.device),
        gradient_bytes // (1 if config.gradient_dtype == "fp32" else 2),
    )


def check_device_memory(
    probe: StepProbe, torch_device: torch.device, cache_gib: float = 0.0, total_gib: float | None = None
) -> CheckResult:
    """Check that a step and the image cache fit in device memory. total_gib: replaces the device's size in tests."""
    total_gib = total_gib or device.total_memory_gib(torch_device)
    if total_gib is None:
        return CheckResult("device memory", "pass", f"a step takes {probe.peak_gib:.2f} GiB of host memory")
    message = f"a step takes {probe.peak_gib:.1f} of {total_gib:.1f} GiB"
    if cache_gib:
        message += f", the image cache {cache_gib:.1f}"
    if probe.peak_gib + cache_gib > 0.9 * total_gib:
        flags = "--batch-size or --image-cache-gib" if cache_gib else "--batch-size"
        return CheckResult(
            "device memory", "warn", message, f"Batches with more boxes may not fit. Pass a smaller {flags}."
        )
    return CheckResult("device memory", "pass", message)


def measure_all_reduce(ranks: DistContext) -> tuple[float, bool]:
    """Return the median time in s of an all-reduce of 64 MiB, and whether its result is correct."""
    if not ranks.is_distributed:
        return 0.0, True
    elapsed_s = []
    is_correct = True
    for round_index in range(1 + NUM_ROUNDS):  # the first one opens the connections
        tensor = torch.full((ALL_REDUCE_BYTES // 4,), float(ranks.rank), device=ranks.device)
        ranks.barrier()
        device.synchronize(ranks.device)
        start_s = time.monotonic()
        ranks.all_reduce_mean(tensor)
        device.synchronize(ranks.device)
        if round_index:
            elapsed_s.append(time.monotonic() - start_s)
        is_correct &= bool(torch.allclose(tensor, torch.full_like(tensor, (ranks.world_size - 1) / 2)))
    return statistics.median(elapsed_s), is_correct


def check_bandwidth(measured: tuple[float, bool], probe: StepProbe | None, world_size: int) -> CheckResult:
    """Check that all-reduce is correct, and that the gradient takes less than half of a step to reduce."""
    elapsed_s, is_correct = measured
    if world_size == 1:
        return CheckResult("collectives", "pass", "single rank, not applicable")
    rate = f"{ALL_REDUCE_BYTES / 2**30 / elapsed_s:.3g} GiB/s over {world_size} ranks"
    if not is_correct:
        hint = "The collective library or its transport is broken. Update it, or try another transport."
        return CheckResult("collectives", "fail", f"all-reduce over {world_size} ranks gives a wrong result", hint)
    if probe is None:
        return CheckResult("collectives", "pass", rate)
    gradient_s = elapsed_s * probe.gradient_bytes / ALL_REDUCE_BYTES
    gradient = f"{format_bytes(probe.gradient_bytes)} of gradient takes {gradient_s:.3g} s"
    message = f"{rate}: {gradient}, a step {probe.step_s:.3g} s"
    if gradient_s > 0.5 * probe.step_s:
        hint = "Check that the ranks use their fast links (NCCL_DEBUG=INFO). --gradient-dtype bf16 halves the traffic."
        return CheckResult("collectives", "warn", message, hint)
    return CheckResult("collectives", "pass", message)


def check_data(
    config: Config, layout: LaunchLayout, spec: PreflightSpec[Config], *, decode_all: bool = False
) -> list[CheckResult]:
    """Check that the data set is complete and decodable, and that the pretrained backbone is intact."""
    try:
        backbone = [CheckResult("backbone", "pass", run_checks.check_backbone(config))]
    except InputError as error:
        backbone = [CheckResult("backbone", "fail", str(error))]
    try:
        if not config.required_splits:
            return [CheckResult("data", "pass", "not read: the input is synthetic"), *backbone]
        if run_checks.pending_synthetic_data(config):
            return [CheckResult("data", "pass", f"{config.data_dir}: generated when the run starts"), *backbone]
        splits, info = run_checks.check_data(config, layout, spec)
    except InputError as error:
        return [CheckResult("data", "fail", line) for line in str(error).splitlines()] + backbone
    except OSError as error:
        message = f"DATADIR={config.data_dir}: {error.strerror}: {error.filename}"
        return [CheckResult("data", "fail", message, "Check that the folder is readable."), *backbone]
    results = [
        CheckResult("data", "warn" if line.startswith("warning: ") else "pass", line.removeprefix("warning: "))
        for line in info
    ]
    for name, split in splits.items():
        results += check_images(name, split, decode_all=decode_all)
        if config.dataset == "coco2017":
            annotation_file, _ = coco.dataset_paths(config, "train" if name == "train" else "val", segmentations=True)
            results += check_published(name, split, annotation_file, coco2017.PUBLISHED[name])
    return results + backbone


def check_images(name: str, split: Split, *, decode_all: bool) -> list[CheckResult]:
    """Decode all images of a split, or a few that are spread over it. Return a result for each unreadable one."""
    indices: Iterable[int] = range(len(split))
    if not decode_all:
        indices = sorted({round(sample * (len(split) - 1) / (NUM_SAMPLES - 1)) for sample in range(NUM_SAMPLES)})
    errors = map_files(decode_error, [split.image_file(index) for index in indices])
    check = "images" if decode_all else "sample"
    if failed := [CheckResult(check, "fail", str(error)) for error in errors if error]:
        return failed
    message = (
        f"all {len(errors)} images decoded" if decode_all else f"{len(errors)} images decoded, spread over the split"
    )
    return [CheckResult(check, "pass", f"{name}: {message}")]


def decode_error(file: ImageFile) -> InputError | None:
    """Decode an image. Return the error of an unreadable one."""
    try:
        image_io.read(*file)
    except InputError as error:
        return error
    return None


def check_published(name: str, split: Split, file: Path, published: PublishedSplit) -> list[CheckResult]:
    """Check the counts of a COCO 2017 split and the checksum of its annotations."""
    hint = "Remove it and run ./init_datasets.sh, or pass another --dataset if the data set is not COCO 2017."
    counts = (len(split) + split.num_missing_images, len(split.labels) + split.num_dropped_boxes)
    expected = (published.num_images, published.num_annotations)
    message = f"{name}: {counts[0]} images and {counts[1]} annotations"
    if counts == expected:
        results = [CheckResult("COCO 2017", "pass", message)]
    else:
        results = [
            CheckResult("COCO 2017", "fail", f"{message}, but COCO 2017 has {expected[0]} and {expected[1]}", hint)
        ]
    if not file.exists():
        return [
            *results,
            CheckResult(
                "checksum",
                "warn",
                f"{file} not found, cannot verify its checksum",
                "Keep it next to the shrunken annotations.",
            ),
        ]
    digest = coco2017.sha256(file)
    if digest != published.sha256:
        message = f"{file}: SHA-256 {digest[:8]}..., but COCO 2017's is {published.sha256[:8]}..."
        return [*results, CheckResult("checksum", "fail", message, hint)]
    return [*results, CheckResult("checksum", "pass", f"{file.name}: SHA-256 {digest[:8]}..., COCO 2017's")]
