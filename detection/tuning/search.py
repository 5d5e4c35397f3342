"""Search for the fastest training settings of this machine.

`python -m WORKLOAD tune --autotune [SECONDS] [--name NAME] [--force] [--name value ...]` starts from the settings of
the config file and the flags, times trials until the budget is used up, and writes a config file. It follows each
search axis while that makes training faster.
"""

import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, TypeVar

from detection.config.run_config import RunConfig
from detection.config.settings import InputError, LaunchLayout, ResolvedSettings, read_launch_layout
from detection.data import num_classes
from detection.preflight import run_checks
from detection.preflight.run_checks import PreflightSpec
from detection.runtime import device
from detection.tuning import config_file
from detection.tuning.config_file import ConfigFile
from detection.tuning.trial import Trial, measure_training
from mlperf import recipes, rules
from mlperf.recipes import Recipe

Config = TypeVar("Config", bound=RunConfig)
Settings = Mapping[str, str]

DEFAULT_SECONDS = 300
TUNED_SETTINGS = (
    "batch_size",
    "grad_accum_steps",
    "num_workers",
    "precision",
    "compile",
    "image_cache",
    "jpeg_decoder",
)
MIN_SPEEDUP = 1.03  # a smaller gain may be noise
WORKER_COUNTS = (0, 1, 2, 3, 4, 6, 8, 12, 15, 20, 24, 32)
FIRST_STEPS, MAX_STEPS = 3, 50
CONFIG_DIR = Path()  # the folder of ./run_and_time.sh


@dataclass(frozen=True)
class TuneTarget(Generic[Config]):
    """Target of the search: package of a workload, settings prefix, preflight checks and recipe as settings."""

    package: str
    prefix: str
    preflight: PreflightSpec[Config]
    recipe_settings: Callable[[Recipe], dict[str, str]]


@dataclass(frozen=True)
class TuneRequest:
    """Command line of a search: time budget, name of the config file, permission to overwrite it, other flags."""

    seconds: int = DEFAULT_SECONDS
    name: str = ""
    force: bool = False
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class SearchAxis:
    """Values of one setting, tried in order until one is not faster. adopt: whether to keep the fastest."""

    setting: str
    values: tuple[str, ...]
    adopt: bool = True


@dataclass(frozen=True)
class TuneResult:
    """First and best trial, and the expected epochs and training time of a run with the best settings."""

    first: Trial
    best: Trial
    epochs: float
    train_s: float


@dataclass
class Searcher:
    """Search for the fastest settings within a time budget.

    measure: called with settings, steps, warm-up steps and a time limit in seconds. cost: the quantity to minimize.
    """

    measure: Callable[[Settings, int, int, float], Trial]
    cost: Callable[[Trial], float]
    end_s: float
    steps: int = FIRST_STEPS
    trials: list[Trial] = field(default_factory=list)

    def run_trial(self, settings: Settings, *, warmup: int = 1) -> Trial | None:
        """Time one trial. Return None if the remaining time is shorter than the longest trial so far."""
        left_s = self.end_s - time.monotonic()
        if self.trials and left_s < 1.1 * max(
            trial.elapsed_s for trial in self.trials if trial.status != "out of time"
        ):
            return None
        self.trials.append(self.measure(settings, self.steps, warmup, max(left_s, 1)))
        print(table_row(self.trials[-1]), flush=True)
        return self.trials[-1]

    def hill_climb(self, best: Trial, axis: SearchAxis) -> Trial:
        """Return the fastest trial along an axis, starting from the best one so far."""
        fastest = best
        for value in axis.values:
            trial = self.run_trial({**best.settings, axis.setting: value})
            if trial is None or trial.status != "measured" or self.cost(trial) * MIN_SPEEDUP > self.cost(fastest):
                break
            fastest = trial
        return fastest if axis.adopt else best


def main(argv: Sequence[str], target: TuneTarget[Config]) -> int:
    """Search, print the table, write the config file, and return the exit status. Raises InputError."""
    request = parse_request(argv)
    start_s = time.monotonic()
    resolved = target.preflight.load(request.flags)
    num_ranks = local_ranks(resolved.config, read_launch_layout())
    layout = replace(read_launch_layout(), ranks_per_node=num_ranks)
    path = output_path(request, resolved.config, hardware_name(resolved.config), layout)
    tune(request, resolved, target, layout, path, start_s)
    return 0


def parse_request(argv: Sequence[str]) -> TuneRequest:
    """Separate the flags of the search from those of the run. Raises InputError."""
    request, flags, words = TuneRequest(), [], list(argv)
    while words:
        word = words.pop(0)
        if word == "--autotune":
            if words and not words[0].startswith("-"):
                seconds = words.pop(0)
                if not seconds.isdecimal() or int(seconds) < 1:
                    raise InputError(f"--autotune {seconds}: should be a positive whole number of seconds")
                request = replace(request, seconds=int(seconds))
        elif word == "--force":
            request = replace(request, force=True)
        elif word == "--name" or word.startswith("--name="):
            name = word.partition("=")[2] if "=" in word else words.pop(0) if words else ""
            if not re.fullmatch(r"[\w.-]+", name):
                raise InputError(f"--name {name}: should contain only letters, digits, dots, dashes and underscores")
            request = replace(request, name=name)
        else:
            flags.append(word)
    return replace(request, flags=tuple(flags))


def local_ranks(config: RunConfig, layout: LaunchLayout) -> int:
    """Return the number of ranks on this machine: its accelerators, or the config file's number on a CPU."""
    torch_device = device.select_device(config.device, 0)
    return layout.ranks_per_node if torch_device.type == "cpu" else device.backend_module(torch_device).device_count()


def hardware_name(config: RunConfig) -> str:
    """Return the name of the accelerator, or the number of CPU cores."""
    torch_device = device.select_device(config.device, 0)
    return (
        f"CPU, {len(os.sched_getaffinity(0))} cores" if torch_device.type == "cpu" else device.device_name(torch_device)
    )


def output_path(request: TuneRequest, config: RunConfig, hardware: str, layout: LaunchLayout) -> Path:
    """Return the path of the config file. Raises InputError if it exists and --force is not given."""
    default_name = re.sub(r"[^\w.-]+", "-", hardware.removeprefix("NVIDIA ").replace(", ", ""))
    name = request.name or f"{default_name}_{layout.num_nodes}x{layout.ranks_per_node}"
    suffix = "" if config.benchmark == "ssd" else f"_{config.benchmark}"
    path = CONFIG_DIR / f"config_{name}{suffix}.sh"
    if path.exists() and not request.force:
        raise InputError(f"{path}: already exists. Pass another --name, or --force to overwrite it")
    return path


def tune(
    request: TuneRequest,
    resolved: ResolvedSettings[Config],
    target: TuneTarget[Config],
    layout: LaunchLayout,
    path: Path,
    start_s: float,
) -> None:
    """Search within the time budget and write the config file. Raises InputError if the first trial fails."""
    config = resolved.config
    num_images = count_train_images(config, layout, target.preflight)
    has_recipes = uses_published_recipes(config)

    def epochs(settings: Settings) -> float:
        batch = int(settings["batch_size"]) * layout.world_size
        reference = recipes.reference_epochs(config.benchmark, config.ruleset, batch) if has_recipes else None
        return reference or config.epochs

    def train_s(trial: Trial) -> float:
        return epochs(trial.settings) * num_images / (trial.images_per_s * layout.num_nodes)

    flags = [*request.flags, "--num-classes", str(num_classes.resolve_num_classes(config).num_classes)]

    def measure(settings: Settings, steps: int, warmup: int, limit_s: float) -> Trial:
        return measure_training(
            target.package, flags, settings, ranks=layout.ranks_per_node, steps=steps, warmup=warmup, limit_s=limit_s
        )

    searcher = Searcher(measure, train_s, start_s + request.seconds)
    print(table_header(), flush=True)
    first = find_baseline(searcher, {name: str(getattr(config, name)) for name in TUNED_SETTINGS})
    best = first
    for axis in search_axes(best, config, layout, num_images, has_recipes):
        best = searcher.hill_climb(best, axis)
    memories = ("host",) if device.select_device(config.device, 0).type == "cpu" else ("host", "device")
    steps_per_epoch = num_images // (int(best.settings["batch_size"]) * layout.world_size)
    best = try_image_cache(searcher, best, max(1, steps_per_epoch), memories)
    write_config(TuneResult(first, best, epochs(best.settings), train_s(best)), request, resolved, target, layout, path)


def count_train_images(config: Config, layout: LaunchLayout, preflight: PreflightSpec[Config]) -> int:
    """Return the number of training images per epoch. Generates a missing synthetic data set first."""
    if generate := run_checks.pending_synthetic_data(config):
        generate()
    splits, _ = run_checks.check_data(config, layout, preflight)
    return len(preflight.select_train_images(config, splits["train"]))


def uses_published_recipes(config: RunConfig) -> bool:
    """Return whether published recipes of other global batches apply to this run."""
    return config.division == "closed" and config.dataset == rules.BENCHMARKS[config.benchmark].dataset


def find_baseline(searcher: Searcher, settings: dict[str, str]) -> Trial:
    """Time the initial settings.

    Doubles the number of micro-batches while memory is insufficient, and repeats short steps more often.
    Raises InputError if no trial succeeds.
    """
    trial = searcher.run_trial(settings)
    while trial and trial.status == "out of memory":
        micro_batches = 2 * int(settings["grad_accum_steps"])
        if int(settings["batch_size"]) % micro_batches:
            raise InputError(f"batch_size {settings['batch_size']} does not fit in memory. Pass a smaller --batch-size")
        settings = {**settings, "grad_accum_steps": str(micro_batches)}
        trial = searcher.run_trial(settings)
    if trial is None or trial.status == "out of time":
        raise InputError("the first trial did not finish in time. Give --autotune more seconds")
    if trial.status == "failed":
        raise InputError(f"the first trial failed: {trial.reason.removeprefix('error: ')}")
    trial_budget_s = (searcher.end_s - time.monotonic()) / 20
    steps = min(MAX_STEPS, int(trial_budget_s / (trial.step_ms / 1000)))
    if steps < 2 * FIRST_STEPS:
        return trial
    searcher.steps = steps
    longer = searcher.run_trial(settings)
    return longer if longer and longer.status == "measured" else trial


def search_axes(
    first: Trial, config: RunConfig, layout: LaunchLayout, num_images: int, has_recipes: bool
) -> list[SearchAxis]:
    """Return the axes to search, in order.

    A published recipe exists for several batch sizes, which come first. Any other recipe is only valid for its own
    batch size, so other sizes come last and are timed but not adopted.
    """
    torch_device = device.select_device(config.device, 0)
    precisions = ("bf16", "fp32") if torch_device.type == "cpu" else ("bf16", "fp16", "tf32")
    workers = int(first.settings["num_workers"])
    max_workers = max(1, len(os.sched_getaffinity(0)) // layout.ranks_per_node)
    is_compiled = device.should_compile(config.compile, torch_device)
    first_batch = int(first.settings["batch_size"])
    batch_sizes = [
        first_batch * 2**power for power in range(1, 12) if first_batch * 2**power * layout.world_size <= num_images
    ]
    if has_recipes:
        batch_sizes = [
            batch_size
            for batch_size in batch_sizes
            if recipes.reference_epochs(config.benchmark, config.ruleset, batch_size * layout.world_size) is not None
        ]
    batch_axis = SearchAxis("batch_size", tuple(map(str, batch_sizes)), adopt=has_recipes)
    axes = [
        *(SearchAxis("precision", (name,)) for name in precisions if name != first.precision),
        SearchAxis("num_workers", tuple(str(count) for count in WORKER_COUNTS if workers < count <= max_workers)),
        SearchAxis("num_workers", tuple(str(count) for count in reversed(WORKER_COUNTS) if count < workers)),
    ]
    if device.supports_jpeg_decode(torch_device):
        axes.append(SearchAxis("jpeg_decoder", ("gpu",)))
    if device.CAN_COMPILE:
        axes.append(SearchAxis("compile", ("off" if is_compiled else "on",)))
    return [batch_axis, *axes] if has_recipes else [*axes, batch_axis]


def try_image_cache(searcher: Searcher, best: Trial, steps_per_epoch: int, memories: Sequence[str]) -> Trial:
    """Time the image cache in each memory, after the epoch that fills it, if the remaining time allows."""
    if best.settings["image_cache"] != "none":
        return best
    uncached, settings = best, best.settings
    for memory in memories:
        fill_s = uncached.elapsed_s + steps_per_epoch * uncached.step_ms / 1000
        if fill_s > searcher.end_s - time.monotonic():
            print(f"image_cache {memory}: not measured. Filling it takes one epoch, about {fill_s:.0f} s")
            return best
        decoder = settings["jpeg_decoder"] if memory == "device" else "cpu"
        trial = searcher.run_trial({**settings, "image_cache": memory, "jpeg_decoder": decoder}, warmup=steps_per_epoch)
        if trial and trial.status == "measured" and searcher.cost(trial) * MIN_SPEEDUP < searcher.cost(best):
            best = trial
    return best


COLUMNS = (
    "batch",
    "accum",
    "workers",
    "precision",
    "compile",
    "cache",
    "jpeg_decoder",
    "img/s",
    "ms/step",
    "data wait",
)


def table_header() -> str:
    """Return the first line of the table."""
    return "  ".join(f"{title:>9}" for title in COLUMNS)


def table_row(trial: Trial) -> str:
    """Format a trial as a line of the table."""
    cells = [trial.settings[name] for name in TUNED_SETTINGS]
    if trial.status == "measured":
        cells[3] = trial.precision
        cells += [f"{trial.images_per_s:.1f}", f"{trial.step_ms:.0f}", f"{trial.data_fraction:.0%}"]
    else:
        cells.append(f"{trial.status}{f': {trial.reason}' if trial.status == 'failed' else ''}")
    return "  ".join(f"{cell:>9}" for cell in cells)


def write_config(
    result: TuneResult,
    request: TuneRequest,
    resolved: ResolvedSettings[Config],
    target: TuneTarget[Config],
    layout: LaunchLayout,
    path: Path,
) -> None:
    """Write the config file: the best settings, the recipe of their global batch, and the expected training time."""
    start, best = resolved.config, result.best
    has_recipes = uses_published_recipes(start)
    batch = int(best.settings["batch_size"]) * layout.world_size
    settings = dict(best.settings)
    if best.settings["precision"] == "auto":
        settings["precision"] = best.precision
    start_batch = start.global_batch_size(read_launch_layout().world_size)
    source = f"config_{start.system}.sh, for {start_batch} images per step"
    if not has_recipes and batch != start_batch:
        source += f", with the learning rate scaled to {batch}"
    if has_recipes and batch != start_batch:
        recipe = recipes.interpolate_recipe(start.benchmark, batch)
        settings |= target.recipe_settings(recipe)
        source = recipe.source
        if result.epochs > 0.9 * start.epochs:
            settings["epochs"] = str(5 * math.ceil(1.3 * result.epochs / 5))
    final = target.preflight.load([*request.flags, *config_file.to_flags(settings)])
    rule_values = target.preflight.rule_values(final.config, layout.world_size)
    _, violations = run_checks.check_rules(final.config, rule_values, layout.world_size)
    verdict = f"forbids {len(violations)} of its values (--dry-run lists them)" if violations else "allows it"
    comments = [
        f"measured: {best.images_per_s:.1f} img/s on {layout.ranks_per_node} ranks, "
        f"{best.images_per_s / result.first.images_per_s:.2f} times config_{start.system}.sh",
        f"recipe: {source}; MLPerf {start.ruleset} {start.division} {verdict}",
        f"expected: {'' if has_recipes else 'at most '}{result.epochs:g} epochs, {result.train_s / 60:.1f} minutes of "
        "training without evaluation"
        + (f", if {layout.num_nodes} nodes scale linearly" if layout.num_nodes > 1 else ""),
    ]
    title = f"{layout.num_nodes}×{layout.ranks_per_node} {hardware_name(start)}, from ./run_and_time.sh --autotune"
    always_written = (*TUNED_SETTINGS[:4], "compile")
    ConfigFile(title, comments, layout, 1.5 * result.train_s, always_written).write(path, final, target.prefix)
    print("\n".join([*comments, f"wrote {path}: DGXSYSTEM={path.stem.removeprefix('config_')} ./run_and_time.sh"]))
