"""Which settings train fastest on this machine: tried one after the other for a bounded time, and written to a file.

`python -m BENCHMARK.tune --autotune [SECONDS] [--name NAME] [--force] [--name value ...]` starts from the settings of the
config file and the flags. Each direction is followed as long as it gains; what is out of memory ends it.
"""

import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, TypeVar

from detection.config.run_config import RunConfig
from detection.config.settings import InputError, Resolved, System, read_system
from detection.data import num_classes
from detection.preflight import run_checks
from detection.preflight.run_checks import Checks
from detection.runtime import device
from detection.tuning import config_file, trial
from detection.tuning.config_file import SystemFile
from detection.tuning.trial import Trial
from mlperf import recipes
from mlperf.recipes import Recipe

Config = TypeVar("Config", bound=RunConfig)
Settings = Mapping[str, str]

SECONDS = 300
TUNED = ("batch_size", "grad_accum_steps", "num_workers", "precision", "compile", "image_cache", "jpeg_decoder")
GAIN = 1.03  # less may be chance
WORKERS = (0, 1, 2, 3, 4, 6, 8, 12, 15, 20, 24, 32)
STEPS, MOST_STEPS = 3, 50
FOLDER = Path()  # config files are where ./run_and_time.sh is


@dataclass(frozen=True)
class Subject(Generic[Config]):
    """What differs between benchmarks: what trains, prefix and checks of the settings, and a recipe as these."""

    module: str
    prefix: str
    checks: Checks[Config]
    settings: Callable[[Recipe], dict[str, str]]


@dataclass(frozen=True)
class Order:
    """What the user asks for: how long, the name of the file or none, and whether it may replace one; other flags."""

    seconds: int = SECONDS
    name: str = ""
    force: bool = False
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Direction:
    """Values of one setting, tried in turn until one gains nothing. chosen: whether the best of them is taken over."""

    setting: str
    values: tuple[str, ...]
    chosen: bool = True


@dataclass(frozen=True)
class Outcome:
    """What was found: the first trial, the best, and what a run with its settings takes, in training alone."""

    first: Trial
    best: Trial
    epochs: float
    train_s: float


@dataclass
class Bench:
    """Measures settings until its time is over.

    measure: settings, steps, warm-up steps and the seconds that it may take. cost: what is to be least.
    """

    measure: Callable[[Settings, int, int, float], Trial]
    cost: Callable[[Trial], float]
    end_s: float
    steps: int = STEPS
    trials: list[Trial] = field(default_factory=list)

    def try_out(self, settings: Settings, *, warmup: int = 1) -> Trial | None:
        """Measure once; None where a trial like those before would not end in time."""
        left_s = self.end_s - time.monotonic()
        if self.trials and left_s < 1.1 * max(one.spent_s for one in self.trials if one.ending != "out of time"):
            return None
        self.trials.append(self.measure(settings, self.steps, warmup, max(left_s, 1)))
        print(row(self.trials[-1]), flush=True)
        return self.trials[-1]

    def follow(self, best: Trial, direction: Direction) -> Trial:
        """The best of a direction, from the best so far."""
        leader = best
        for value in direction.values:
            one = self.try_out({**best.settings, direction.setting: value})
            if one is None or one.ending != "measured" or self.cost(one) * GAIN > self.cost(leader):
                break
            leader = one
        return leader if direction.chosen else best


def main(argv: Sequence[str], subject: Subject[Config]) -> int:
    """Measure, print the table and write the config file; returns the exit status."""
    try:
        order = read(argv)
        start_s = time.monotonic()
        resolved = subject.checks.load(order.flags)
        ranks = found_ranks(resolved.config, read_system())
        system = replace(read_system(), ranks_per_node=ranks)
        path = target(order, resolved.config, hardware(resolved.config), system)
        tune(order, resolved, subject, system, path, start_s)
    except InputError as error:
        print("\n".join(f"error: {mistake}" for mistake in str(error).splitlines()), file=sys.stderr)
        return 2
    return 0


def read(argv: Sequence[str]) -> Order:
    """Take the words of tuning out of the flags; raises InputError."""
    order, flags, words = Order(), [], list(argv)
    while words:
        word = words.pop(0)
        if word == "--autotune":
            if words and not words[0].startswith("-"):
                seconds = words.pop(0)
                if not seconds.isdecimal() or int(seconds) < 1:
                    raise InputError(f"--autotune {seconds}: should be a whole number of seconds")
                order = replace(order, seconds=int(seconds))
        elif word == "--force":
            order = replace(order, force=True)
        elif word == "--name" or word.startswith("--name="):
            name = word.partition("=")[2] if "=" in word else words.pop(0) if words else ""
            if not re.fullmatch(r"[\w.-]+", name):
                raise InputError(f"--name {name}: should be of letters, digits, dots, dashes and underscores")
            order = replace(order, name=name)
        else:
            flags.append(word)
    return replace(order, flags=tuple(flags))


def found_ranks(config: RunConfig, system: System) -> int:
    """Ranks on this machine: its accelerators, or on the CPU as many as the config file says."""
    on = device.choose(config.device, 0)
    return system.ranks_per_node if on.type == "cpu" else device.module(on).device_count()


def hardware(config: RunConfig) -> str:
    """What this machine computes on, for people."""
    on = device.choose(config.device, 0)
    return f"CPU, {len(os.sched_getaffinity(0))} cores" if on.type == "cpu" else device.describe(on)


def target(order: Order, config: RunConfig, hardware: str, system: System) -> Path:
    """The file that is to be written; raises InputError where it is there and is not to be replaced."""
    named = re.sub(r"[^\w.-]+", "-", hardware.removeprefix("NVIDIA ").replace(", ", ""))
    name = order.name or f"{named}_{system.nodes}x{system.ranks_per_node}"
    suffix = "" if config.benchmark == "ssd" else f"_{config.benchmark}"
    path = FOLDER / f"config_{name}{suffix}.sh"
    if path.exists() and not order.force:
        raise InputError(f"{path} is there already: pass another --name, or --force to write over it")
    return path


def tune(
    order: Order,
    resolved: Resolved[Config],
    subject: Subject[Config],
    system: System,
    path: Path,
    start_s: float,
) -> None:
    """Measure as long as the order says, and write the file; raises InputError where not even the first trial runs."""
    config = resolved.config
    num_images = count_images(config, system, subject.checks)
    published = is_published(config)

    def epochs(settings: Settings) -> float:
        batch = int(settings["batch_size"]) * system.world_size
        known = recipes.reference_epochs(config.benchmark, config.ruleset, batch) if published else None
        return known or config.epochs

    def train_s(one: Trial) -> float:
        return epochs(one.settings) * num_images / (one.images_per_s * system.nodes)

    common = [*order.flags, "--num-classes", str(num_classes.followed(config).num_classes)]

    def measure(settings: Settings, steps: int, warmup: int, limit_s: float) -> Trial:
        return trial.run(
            subject.module,
            common,
            settings,
            ranks=system.ranks_per_node,
            steps=steps,
            warmup=warmup,
            limit_s=limit_s,
        )

    bench = Bench(measure, train_s, start_s + order.seconds)
    print(heading(), flush=True)
    first = begin(bench, {name: str(getattr(config, name)) for name in TUNED})
    best = first
    for direction in directions(best, config, system, num_images, published):
        best = bench.follow(best, direction)
    memories = ("host",) if device.choose(config.device, 0).type == "cpu" else ("host", "device")
    steps_per_epoch = num_images // (int(best.settings["batch_size"]) * system.world_size)
    best = try_cache(bench, best, max(1, steps_per_epoch), memories)
    write(Outcome(first, best, epochs(best.settings), train_s(best)), order, resolved, subject, system, path)


def count_images(config: Config, system: System, checks: Checks[Config]) -> int:
    """Training images of an epoch, drawn first where they are to be; raises InputError."""
    if drawing := run_checks.due(config):
        drawing()
    splits, _ = run_checks.check_data(config, system, segmentations=checks.segmentations)
    return len(splits["train"].with_boxes())


def is_published(config: RunConfig) -> bool:
    """Whether recipes that were published for other global batches hold for this run, too."""
    return config.division == "closed" and config.dataset == "coco2017"


def begin(bench: Bench, settings: dict[str, str]) -> Trial:
    """Measure what the settings say, in more parts where it is out of memory, and in more steps where they are short.

    Raises InputError where it cannot be measured.
    """
    one = bench.try_out(settings)
    while one and one.ending == "out of memory":
        parts = 2 * int(settings["grad_accum_steps"])
        if int(settings["batch_size"]) % parts:
            raise InputError(f"batch_size {settings['batch_size']} does not fit: pass a smaller --batch-size")
        settings = {**settings, "grad_accum_steps": str(parts)}
        one = bench.try_out(settings)
    if one is None or one.ending == "out of time":
        raise InputError("the first trial did not end in time: give --autotune more seconds")
    if one.ending == "failed":
        raise InputError(f"the first trial failed: {one.why.removeprefix('error: ')}")
    of_a_trial_s = (bench.end_s - time.monotonic()) / 20
    steps = min(MOST_STEPS, int(of_a_trial_s / (one.step_ms / 1000)))
    if steps < 2 * STEPS:
        return one
    bench.steps = steps
    again = bench.try_out(settings)
    return again if again and again.ending == "measured" else one


def directions(first: Trial, config: RunConfig, system: System, num_images: int, published: bool) -> list[Direction]:
    """What is tried, in order: precision, workers, the compiler, batch sizes.

    A recipe that is no published one holds for its own batch size alone: others are measured, and not taken over.
    """
    on = device.choose(config.device, 0)
    precisions = ("bf16", "fp32") if on.type == "cpu" else ("bf16", "fp16", "tf32")
    workers = int(first.settings["num_workers"])
    most = max(1, len(os.sched_getaffinity(0)) // system.ranks_per_node)
    compiled = device.compiles(config.compile, on)
    size = int(first.settings["batch_size"])
    sizes = [size * 2**power for power in range(1, 12) if size * 2**power * system.world_size <= num_images]
    if published:
        sizes = [
            one
            for one in sizes
            if recipes.reference_epochs(config.benchmark, config.ruleset, one * system.world_size) is not None
        ]
    batches = Direction("batch_size", tuple(map(str, sizes)), chosen=published)
    others = [
        *(Direction("precision", (name,)) for name in precisions if name != first.precision),
        Direction("num_workers", tuple(str(count) for count in WORKERS if workers < count <= most)),
        Direction("num_workers", tuple(str(count) for count in reversed(WORKERS) if count < workers)),
    ]
    if device.decodes_jpeg(on):
        others.append(Direction("jpeg_decoder", ("gpu",)))
    if device.CAN_COMPILE:
        others.append(Direction("compile", ("off" if compiled else "on",)))
    return [batches, *others] if published else [*others, batches]


def try_cache(bench: Bench, best: Trial, steps_per_epoch: int, memories: Sequence[str]) -> Trial:
    """Measure decoded images kept in each memory, after the epoch that fills it, where there is time for that."""
    if best.settings["image_cache"] != "none":
        return best
    plain, settings = best, best.settings
    for memory in memories:
        fill_s = plain.spent_s + steps_per_epoch * plain.step_ms / 1000
        if fill_s > bench.end_s - time.monotonic():
            print(f"decoded images kept by the {memory} are not measured: the epoch before takes some {fill_s:.0f} s")
            return best
        decoder = settings["jpeg_decoder"] if memory == "device" else "cpu"
        one = bench.try_out({**settings, "image_cache": memory, "jpeg_decoder": decoder}, warmup=steps_per_epoch)
        if one and one.ending == "measured" and bench.cost(one) * GAIN < bench.cost(best):
            best = one
    return best


COLUMNS = (
    "batch",
    "parts",
    "workers",
    "precision",
    "compile",
    "cache",
    "jpeg_decoder",
    "img/s",
    "ms a step",
    "waits for data",
)


def heading() -> str:
    """The first line of the table."""
    return "  ".join(f"{title:>9}" for title in COLUMNS)


def row(one: Trial) -> str:
    """A trial as a line of the table."""
    cells = [one.settings[name] for name in TUNED]
    if one.ending == "measured":
        cells[3] = one.precision
        cells += [f"{one.images_per_s:.1f}", f"{one.step_ms:.0f}", f"{one.data_share:.0%}"]
    else:
        cells.append(f"{one.ending}{f': {one.why}' if one.ending == 'failed' else ''}")
    return "  ".join(f"{cell:>9}" for cell in cells)


def write(
    found: Outcome,
    order: Order,
    resolved: Resolved[Config],
    subject: Subject[Config],
    system: System,
    path: Path,
) -> None:
    """Write the settings of the best trial, and the recipe of its global batch, with what is to be expected."""
    old, best = resolved.config, found.best
    published = is_published(old)
    batch = int(best.settings["batch_size"]) * system.world_size
    settings = dict(best.settings)
    if best.settings["precision"] == "auto":
        settings["precision"] = best.precision
    of_old = old.global_batch_size(read_system().world_size)
    source = f"config_{old.system}.sh's own, for its {of_old} images a step"
    if not published and batch != of_old:
        source += f", its learning rate scaled to {batch}"
    if published and batch != of_old:
        recipe = recipes.recipe(old.benchmark, batch)
        settings |= subject.settings(recipe)
        source = recipe.source
        if found.epochs > 0.9 * old.epochs:
            settings["epochs"] = str(5 * math.ceil(1.3 * found.epochs / 5))
    final = subject.checks.load([*order.flags, *config_file.flags(settings)])
    judged = run_checks.judge(final.config, subject.checks.recipe(final.config, system.world_size), system.world_size)
    verdict = f"forbids {len(judged[1])} of its values (--dry-run names them)" if judged[1] else "allows it"
    remarks = [
        f"measured: {best.images_per_s:.1f} img/s on {system.ranks_per_node} ranks, "
        f"{best.images_per_s / found.first.images_per_s:.2f} times what config_{old.system}.sh gave",
        f"recipe: {source}; MLPerf {old.ruleset} {old.division} {verdict}",
        f"expected: {found.epochs:g} epochs{'' if published else ' at most'}, {found.train_s / 60:.1f} minutes of "
        "training, evaluation not counted" + (f", if {system.nodes} nodes scale linearly" if system.nodes > 1 else ""),
    ]
    title = f"{system.nodes}×{system.ranks_per_node} {hardware(old)}, by ./run_and_time.sh --autotune"
    always = (*TUNED[:4], "compile")
    SystemFile(title, remarks, system, 1.5 * found.train_s, always).write(path, final, subject.prefix)
    print("\n".join([*remarks, f"wrote {path}: DGXSYSTEM={path.stem.removeprefix('config_')} ./run_and_time.sh"]))
