"""Whether the machines of a run are ready for it: what every rank finds, as one table.

`python -m detection.runtime.launch ... -m BENCHMARK.inspection [--name value ...]` takes the settings of a run and starts none.
Each check is a function of what was read or measured, and returns a `Finding`. Exit status 0, or 2 if something fails.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from detection.config.run_config import COCO_CLASSES, RunConfig
from detection.config.settings import InputError, System, Topology, read_topology, to_json
from detection.data import coco, coco2017, device_cache, image_io, num_classes
from detection.data.batch import Share
from detection.data.coco import Split
from detection.data.coco2017 import Published
from detection.data.prefetch import move
from detection.engine import train_loop
from detection.engine.train_loop import Benchmark
from detection.preflight import run_checks
from detection.preflight.check_result import Finding, table, terminal_columns
from detection.preflight.resources import MIB, check_machine, size
from detection.preflight.run_checks import Checks, batch_bytes
from detection.runtime import device
from detection.runtime.distributed import PeerLost, Ranks, connect
from detection.runtime.signals import end_with_parent

Config = TypeVar("Config", bound=RunConfig)

SAMPLES = 4  # images of each split that are decoded
ALL_REDUCE_BYTES = 64 * MIB
ROUNDS = 5
TIMEOUT_S = 600
FOLDERS = ("data_dir", "log_dir", "run_dir", "backbone")


@dataclass(frozen=True)
class Trial:
    """A training step on noise, on this rank alone: its time, the most memory so far, and what it would send."""

    step_s: float
    peak_gib: float
    gradient_bytes: int


def main(argv: Sequence[str], checks: Checks[Config], make_benchmark: Callable[[Config, Ranks], Benchmark[Any]]) -> int:
    """Inspect as one of the launched ranks; the first prints the table. Returns the exit status."""
    topology = Topology()
    try:
        config, topology = checks.load(argv).config, read_topology()
        if topology.launched:
            end_with_parent()
        of_device, on = choose(config.device, topology.local_rank)
        if of_device.verdict != "fail":
            device_cache.check(config, on)
        with connect(topology, on, timeout_s=TIMEOUT_S) as ranks:
            found = [of_device, *check_rank(config, topology, checks, ranks, make_benchmark)]
            gathered = ranks.gather(found)
            failed = any(finding.verdict == "fail" for findings in gathered for finding in findings)
            if ranks.is_first:
                print(table(gathered, terminal_columns()), flush=True)
            return 2 if ranks.broadcast(failed) else 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except PeerLost as error:
        print(f"error: rank {topology.rank}: {error}", file=sys.stderr)
        return 2


def check_rank(
    config: Config,
    topology: Topology,
    checks: Checks[Config],
    ranks: Ranks,
    make_benchmark: Callable[[Config, Ranks], Benchmark[Any]],
) -> list[Finding]:
    """All that one rank checks; what is of the whole machine, the first on it."""
    found = [check_alike(config, ranks), check_driver(device.driver(), ranks.device), check_clock(ranks)]
    alone = Ranks(0, 1, ranks.device)
    benchmark = make_benchmark(with_classes(config), alone)
    parameter_bytes = sum(tensor.nbytes for tensor in benchmark.model.parameters())
    ranks.barrier()  # all of a machine take their memory at once, as in a run
    tried, of_step = check_step(benchmark, config, alone)
    found += of_step
    found.append(check_bandwidth(measure_all_reduce(ranks), tried, ranks.world_size))
    if ranks.is_first:
        found += check_rules(config, checks.recipe(config, ranks.world_size), ranks.world_size)
    if topology.local_rank == 0:
        system = System(nodes=topology.nodes, ranks_per_node=topology.local_world_size)
        found += check_data(config, system, segmentations=checks.segmentations)
        found += check_machine(config, topology, batch_bytes(config, checks), parameter_bytes)
    return found


def choose(name: str, local_rank: int) -> tuple[Finding, torch.device]:
    """The device of a rank, or the CPU for what else can be checked where that is not there."""
    try:
        on = device.choose(name, local_rank)
    except InputError as error:
        return Finding("device", "fail", str(error), "See that this torch is the accelerator's."), torch.device("cpu")
    if on.type == "cpu" and name == "auto" and device.has_card():
        what = "an accelerator's driver is loaded, and torch sees no accelerator: this would train on the CPU"
        return Finding("device", "warn", what, "Install the torch that is built for it (./setup.sh --help)."), on
    return Finding("device", "pass", device.describe(on)), on


def with_classes(config: Config) -> Config:
    """The settings with a number of classes, COCO's where the annotations cannot be read."""
    try:
        return num_classes.followed(config)
    except InputError:
        return replace(config, num_classes=COCO_CLASSES)


def check_alike(config: RunConfig, ranks: Ranks) -> Finding:
    """Whether this rank has the versions and settings of the first; folders may have other names on other machines."""
    mine = json.loads(to_json(config)) | {"torch": torch.__version__, "Python": platform.python_version()}
    first: Mapping[str, object] = ranks.broadcast(mine)
    other = [name for name in mine if name not in FOLDERS and mine[name] != first[name]]
    if other:
        what = "not as on rank 0: " + ", ".join(f"{name} {mine[name]} for {first[name]}" for name in other)
        return Finding("versions", "fail", what, "Install the same on every node, and pass the same settings.")
    return Finding("versions", "pass", f"torch {mine['torch']}, Python {mine['Python']}, settings as on rank 0")


def check_rules(config: RunConfig, recipe: Mapping[str, object], world_size: int) -> list[Finding]:
    """Whether MLPerf's rules let such a run start; `--dry-run` says what they make of each value."""
    said, broken = run_checks.judge(config, recipe, world_size)
    named = f"MLPerf {config.ruleset} {config.division}"
    if broken:
        return [Finding("rules", "fail", *line.rsplit(". ", 1)) for line in broken]
    warned = [line.removeprefix("warning: ") for line in said if line.startswith("warning: ")]
    if warned:
        return [Finding("rules", "warn", line, "Such a run is no result of that division.") for line in warned]
    if config.mode != "train":
        return [Finding("rules", "pass", said[0])]
    return [Finding("rules", "pass", f"{named} lets it start; --dry-run says what it makes of each value")]


def check_driver(driver: device.Driver, on: torch.device) -> Finding:
    """Whether the driver runs what torch was built for: of an older major version it cannot, of a minor one it may."""
    if on.type == "cpu":
        return Finding("driver", "pass", "none is needed: the CPU computes")
    if driver.built_for is None or driver.runs is None:
        return Finding("driver", "pass", f"{on.type}: torch computes on it, and tells no versions")
    built, runs = (".".join(map(str, version)) for version in (driver.built_for, driver.runs))
    what = f"torch is built for {driver.kind} {built}, the driver runs up to {runs}"
    if driver.runs[0] < driver.built_for[0]:
        return Finding("driver", "fail", what, f"Install a newer driver, or the torch for {driver.kind} {runs}.")
    if driver.runs < driver.built_for:
        todo = "It may lack what was added since: a newer driver is safer."
        return Finding("driver", "warn", what, todo)
    return Finding("driver", "pass", what)


def check_clock(ranks: Ranks) -> Finding:
    """How far this rank's clock is from the first rank's, the median of some readings after a barrier each."""
    readings = []
    for _ in range(ROUNDS):
        ranks.barrier()
        readings.append(time.time())
    first: list[float] = ranks.broadcast(readings)
    return judge_clock(statistics.median(mine - theirs for mine, theirs in zip(readings, first, strict=True)))


def judge_clock(skew_s: float) -> Finding:
    """Whether a clock is near enough to the first rank's, for logs of several machines to be read side by side."""
    what = f"at most {max(0.01, abs(skew_s)):.2f} s from that of rank 0"
    todo = "Let NTP or chrony set the clocks of all nodes."
    if abs(skew_s) < 1:
        return Finding("clock", "pass", what)
    return Finding("clock", "warn" if abs(skew_s) < 60 else "fail", what, todo)


def check_step(benchmark: Benchmark[Any], config: RunConfig, alone: Ranks) -> tuple[Trial | None, list[Finding]]:
    """Train two steps on noise, the second timed, and say what memory they took."""
    fewer = "Pass a smaller --batch-size, or more --grad-accum-steps, which compute it in parts."
    of_batch = f"{config.batch_size} images"
    if config.grad_accum_steps > 1:
        of_batch += f" in {config.grad_accum_steps} parts"
    try:
        trial = try_step(benchmark, config, alone)
    except InputError as error:
        return None, [Finding("training step", "fail", str(error), "Change that setting.")]
    except (RuntimeError, MemoryError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        if isinstance(error, MemoryError) or device.is_out_of_memory(str(error)):
            return None, [Finding("training step", "fail", f"{of_batch} do not fit: {lines[0]}", fewer)]
        return None, [Finding("training step", "fail", lines[0], "See what `--mode bench-train` says.")]
    what = f"{of_batch} in {trial.step_s:.3g} s"
    kept_gib = config.image_cache_gib if config.image_cache == "device" else 0.0
    return trial, [Finding("training step", "pass", what), check_device_memory(trial, alone.device, kept_gib)]


def try_step(benchmark: Benchmark[Any], config: RunConfig, alone: Ranks) -> Trial:
    """Train two steps on noise at a learning rate of 0; raises what comes up, out of memory too."""
    state = train_loop.build(benchmark, config, alone)
    share = move(Share(benchmark.made_up_batch(), config.batch_size, 1 / config.batch_size), alone.device)
    for _ in range(2):  # the first lays out memory, and compiles
        start_s = time.monotonic()
        train_loop.train_step(state, share, 0.0, benchmark, config, alone)
        device.synchronize(alone.device)
    step_s = time.monotonic() - start_s
    sent = sum(tensor.nbytes for tensor in state.model.parameters() if tensor.requires_grad)
    return Trial(step_s, device.peak_memory_gib(alone.device), sent // (1 if config.gradient_dtype == "fp32" else 2))


def check_device_memory(
    trial: Trial, on: torch.device, kept_gib: float = 0.0, total_gib: float | None = None
) -> Finding:
    """Whether the device has room beside a step and the images kept there; total_gib: in place of what it has."""
    total_gib = total_gib or device.total_memory_gib(on)
    if total_gib is None:
        return Finding("device memory", "pass", f"a step takes {trial.peak_gib:.2f} GiB, of the machine's")
    what = f"a step takes {trial.peak_gib:.1f} of {total_gib:.1f} GiB"
    if kept_gib:
        what += f", decoded images {kept_gib:.1f}"
    if trial.peak_gib + kept_gib > 0.9 * total_gib:
        smaller = "--batch-size or --image-cache-gib" if kept_gib else "--batch-size"
        return Finding("device memory", "warn", what, f"Larger batches of boxes may not fit: a smaller {smaller}.")
    return Finding("device memory", "pass", what)


def measure_all_reduce(ranks: Ranks) -> tuple[float, bool]:
    """Seconds of the mean of 64 MiB over all ranks, the median of some; and whether that came out right."""
    if not ranks.together:
        return 0.0, True
    spent_s = []
    right = True
    for number in range(1 + ROUNDS):  # the first makes the connections
        tensor = torch.full((ALL_REDUCE_BYTES // 4,), float(ranks.rank), device=ranks.device)
        ranks.barrier()
        device.synchronize(ranks.device)
        start_s = time.monotonic()
        ranks.mean(tensor)
        device.synchronize(ranks.device)
        if number:
            spent_s.append(time.monotonic() - start_s)
        right &= bool(torch.allclose(tensor, torch.full_like(tensor, (ranks.world_size - 1) / 2)))
    return statistics.median(spent_s), right


def check_bandwidth(measured: tuple[float, bool], trial: Trial | None, world_size: int) -> Finding:
    """Whether ranks add up, and whether a step's gradient travels in a small part of the time of the step."""
    spent_s, right = measured
    if world_size == 1:
        return Finding("collectives", "pass", "one rank, which speaks to nobody")
    rate = f"{ALL_REDUCE_BYTES / 2**30 / spent_s:.3g} GiB/s over {world_size} ranks"
    if not right:
        todo = "The collective library or its transport is broken: update it, or try another transport."
        return Finding("collectives", "fail", f"the mean over {world_size} ranks is wrong", todo)
    if trial is None:
        return Finding("collectives", "pass", rate)
    gradient_s = spent_s * trial.gradient_bytes / ALL_REDUCE_BYTES
    what = f"{rate}: {size(trial.gradient_bytes)} of gradient take {gradient_s:.3g} s, a step {trial.step_s:.3g} s"
    if gradient_s > 0.5 * trial.step_s:
        todo = "See that the ranks use their fast links (NCCL_DEBUG=INFO); --gradient-dtype bf16 sends half."
        return Finding("collectives", "warn", what, todo)
    return Finding("collectives", "pass", what)


def check_data(config: RunConfig, system: System, *, segmentations: bool) -> list[Finding]:
    """Whether the data set is whole and can be decoded, and the backbone's weights are what they should be."""
    try:
        backbone = [Finding("backbone", "pass", run_checks.check_backbone(config))]
    except InputError as error:
        backbone = [Finding("backbone", "fail", str(error))]
    try:
        if not config.reads_data:
            return [Finding("data", "pass", "none are read: the input is made up"), *backbone]
        if run_checks.due(config):
            return [Finding("data", "pass", f"{config.data_dir}: drawn when the run starts"), *backbone]
        splits, facts = run_checks.check_data(config, system, segmentations=segmentations)
    except InputError as error:
        return [Finding("data", "fail", line) for line in str(error).splitlines()] + backbone
    except OSError as error:
        what = f"DATADIR={config.data_dir}: {error.strerror}: {error.filename}"
        return [Finding("data", "fail", what, "See that the folder can be read."), *backbone]
    found = [Finding("data", "pass", fact) for fact in facts]
    for name, split in splits.items():
        found.append(check_sample(name, split))
        if config.dataset == "coco2017":
            full, _ = coco.files(config, "train" if name == "train" else "val", segmentations=True)
            found += check_published(name, split, full, coco2017.PUBLISHED[name])
    return found + backbone


def check_sample(name: str, split: Split) -> Finding:
    """Decode a few images from the first to the last of a split."""
    for index in sorted({round(number * (len(split) - 1) / (SAMPLES - 1)) for number in range(SAMPLES)}):
        path = split.image_path(index)
        try:
            size_hw = tuple(image_io.read(path).shape[1:])
        except InputError as error:
            return Finding("sample", "fail", str(error), "Fetch it again: ./init_datasets.sh.")
        if size_hw != tuple(split.sizes_hw[index].tolist()):
            stated = "x".join(map(str, split.sizes_hw[index].tolist()))
            what = f"{path}: {'x'.join(map(str, size_hw))} pixels, and {stated} in {split.annotation_file.name}"
            return Finding("sample", "fail", what, "Images and annotations are not of one data set: fetch both again.")
    return Finding("sample", "pass", f"{name}: {SAMPLES} images from the first to the last are decoded")


def check_published(name: str, split: Split, file: Path, published: Published) -> list[Finding]:
    """Whether a split has as much as COCO 2017's, and the file of its annotations that file's sum."""
    again = "Remove it and run ./init_datasets.sh, or give data that are not COCO 2017 another --dataset."
    counts = (len(split) + split.missing_images, len(split.labels) + split.dropped_boxes)
    wanted = (published.images, published.annotations)
    what = f"{name}: {counts[0]} images and {counts[1]} annotations"
    if counts == wanted:
        found = [Finding("COCO 2017", "pass", what)]
    else:
        found = [Finding("COCO 2017", "fail", f"{what}, and COCO 2017 has {wanted[0]} and {wanted[1]}", again)]
    if not file.exists():
        return [*found, Finding("checksum", "warn", f"{file} is not there to be summed", "Keep it beside the other.")]
    digest = coco2017.sha256(file)
    if digest != published.sha256:
        what = f"{file}: SHA-256 {digest[:8]}..., and COCO 2017's is {published.sha256[:8]}..."
        return [*found, Finding("checksum", "fail", what, again)]
    return [*found, Finding("checksum", "pass", f"{file.name}: SHA-256 {digest[:8]}..., COCO 2017's")]
