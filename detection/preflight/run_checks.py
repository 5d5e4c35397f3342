"""Check a run before its clock starts: settings, rules, data, backbone, run folder.

`python -m BENCHMARK.preflight [--dry-run] [--name value ...]` exits with 0, or with 2 and every mistake found. Its
report goes to stderr and four lines to stdout, for ./run_and_time.sh: the organisation, the run's folder, the mode, and
the number of classes, which follows the annotations where it is not set.
With --dry-run nothing is made or drawn, what is absent is only warned of, and the report goes to stdout, with
all settings. What the closed division forbids is a mistake in both; the open division is told what the closed one would
refuse. With --model-summary nothing is checked but the settings, and the layers of the network go to stdout.

It runs in a process of its own, which keeps nothing: MLPerf forbids to touch the data before run_start in the
one that is timed, and the caches are dropped in between. It imports no torch, so that it answers at once.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from detection import run_dir
from detection.checkpoint import backbone_urls
from detection.config.run_config import RunConfig
from detection.config.settings import InputError, Resolved, System, describe, read_system
from detection.data import coco, worker_shm
from detection.data.num_classes import followed
from detection.engine import tensorboard
from detection.synthetic import coco_scenes, coco_sized, toy
from mlperf import rules

Config = TypeVar("Config", bound=RunConfig)

# COCO's images have sides of at most 640 pixels, and few files of it are longer.
LARGEST_IMAGE_BYTES = 3 * 640 * 640
LARGEST_FILE_BYTES = 2**19


@dataclass(frozen=True)
class Checks(Generic[Config]):
    """What differs between benchmarks.

    load: settings of flags. recipe: what the rules are about, under the names of `mlperf.rules`, for so many ranks.
    image_bytes: of an image as workers hand it over. network: says what a checkpoint holds, or raises InputError
    where it is not of the network of the settings; it may import torch. layers: those of the network of the settings,
    whose num_classes is known, as a table; it may, too. segmentations: whether it trains masks.
    """

    load: Callable[[Sequence[str]], Resolved[Config]]
    recipe: Callable[[Config, int], Mapping[str, object]]
    image_bytes: Callable[[Config], int]
    network: Callable[[Path, Config], str]
    layers: Callable[[Config], str]
    segmentations: bool = False


def batch_bytes(config: Config, checks: Checks[Config]) -> int:
    """Of a batch as a worker hands it over: of its first epoch, where the device makes the images."""
    image_bytes = checks.image_bytes(config)
    if config.images_on_device:
        image_bytes = LARGEST_FILE_BYTES if config.jpeg_decoder == "gpu" else LARGEST_IMAGE_BYTES
    return config.batch_size * image_bytes


def main(argv: Sequence[str], checks: Checks[Config]) -> int:
    """Run all checks and return the exit status."""
    dry_run = "--dry-run" in argv
    try:
        resolved = checks.load([word for word in argv if word not in ("--dry-run", "--model-summary")])
        if "--model-summary" in argv:
            print(checks.layers(with_classes(resolved.config)))
            return 0
        config, system = resolved.config, read_system()
        report = [describe(resolved), ""] if dry_run else []
        judged, broken = judge(config, checks.recipe(config, system.world_size), system.world_size)
        facts, mistakes = check_input(config, system, checks, draw=not dry_run)
        report += judged + facts
        folder = config.run_folder(datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
        report += [f"run folder: {folder}"]
        if dry_run:
            report += [f"warning: {mistake}" for mistake in mistakes]
            print("\n".join(report), flush=True)
            if broken:
                raise InputError("\n".join(broken))
            return 0
        print("\n".join(report), file=sys.stderr, flush=True)
        if mistakes or broken:
            raise InputError("\n".join(broken + mistakes))
        num_classes = followed(config).num_classes
        if system.node_rank == 0:
            make(folder, config)
    except InputError as error:
        print("\n".join(f"error: {mistake}" for mistake in str(error).splitlines()), file=sys.stderr)
        return 2
    print(config.org, folder, config.mode, num_classes, sep="\n")
    return 0


def with_classes(config: Config) -> Config:
    """The settings with their number of classes, before pictures that the program draws are there, too."""
    if config.num_classes == 0 and due(config):
        categories = {"toy": toy.SHAPES, "synthetic_coco": coco_scenes.COCO}[config.dataset]
        return replace(config, num_classes=1 + len(categories))
    return followed(config)


def judge(config: RunConfig, recipe: Mapping[str, object], world_size: int) -> tuple[list[str], list[str]]:
    """Say what MLPerf's rules make of the recipe: all that they look at, and what the closed division forbids."""
    if config.mode != "train":
        return [f"--mode {config.mode} is no MLPerf run: no log, no check and no RESULT"], []
    fixed = rules.BENCHMARKS[config.benchmark].fixed
    values = {
        **{name: getattr(config, name) for name in fixed},
        **recipe,
        "eval_epochs": tuple(block[-1] for block in config.blocks()),
        "dataset": config.dataset,
        "network": config.network_name,
        "checkpoint": config.weights or "none",
        "backbone": config.pretrained_backbone or "none",
        "seed": "none" if config.seed is None else config.seed,
    }
    named = f"MLPerf {config.ruleset} {config.division}"
    said, broken, kept = [], [], []
    for finding in rules.judge(config.benchmark, config.ruleset, config.division, values):
        if not finding.ok:
            broken.append(f"{named} forbids {finding.rule}: {finding.text}")
        elif finding.rule in fixed:
            kept.append(finding.rule)
        else:
            said.append(f"{named}: {finding.rule}: {finding.text}")
    if kept:
        said.append(f"{named}: as in the reference: {', '.join(kept)}")
    exact, peak = config.exact_lr(world_size), config.peak_lr(world_size)
    as_asked = math.isclose(peak, exact, rel_tol=1e-9)
    rounded = "not rounded" if as_asked else f"rounded from {exact:.6g} by lr_round_to"
    said.append(f"peak learning rate {peak:.6g}: {rounded}")
    if config.division == "closed":
        return said, [f"{rule}. Change it, or pass --division open" for rule in broken]
    closed = rules.judge(config.benchmark, config.ruleset, "closed", values)
    said += [f"warning: {rule}" for rule in broken]
    said += [f"note: closed would refuse {finding.rule}: {finding.text}" for finding in closed if not finding.ok]
    return said, []


def check_input(config: Config, system: System, checks: Checks[Config], draw: bool) -> tuple[list[str], list[str]]:
    """Read all that the run will read; returns facts and mistakes. draw: pictures that are drawn and not there yet."""
    facts, mistakes = [], []
    try:
        drawing = due(config) if config.reads_data else None
        if drawing and draw:
            drawing()
        if not config.reads_data:
            facts.append("no data set is read: the input is made up")
        elif drawing and not draw:
            facts.append(f"DATADIR={config.data_dir}: the pictures are drawn when the run starts")
        else:
            facts += check_data(config, system, segmentations=checks.segmentations)[1]
    except InputError as error:
        mistakes += str(error).splitlines()
    except OSError as error:
        mistakes.append(f"DATADIR={config.data_dir}: {error.strerror}: {error.filename}")
    if config.tensorboard:
        try:
            tensorboard.require()
        except InputError as error:
            mistakes.append(str(error))
    try:
        worker_shm.check(config.num_workers * system.ranks_per_node, batch_bytes(config, checks))
    except InputError as error:
        mistakes.append(str(error))
    if config.weights:
        try:
            found = checks.network(Path(config.weights), followed(config))
            facts.append(f"checkpoint: {config.weights} ({found})")
        except InputError as error:
            mistakes.append(str(error))
    elif config.trunk_weights:
        try:
            facts.append(check_backbone(config))
        except InputError as error:
            mistakes.append(str(error))
    return facts, mistakes


def due(config: RunConfig) -> Callable[[], bool] | None:
    """What draws the pictures of this data set, or None: they are there, or are not to be drawn."""
    if config.dataset == "toy" and not any(config.data_dir.glob("*")):
        return partial(toy.draw, config.data_dir, toy.Drawing())
    rehearsed = coco_sized.Drawing(config.synthetic_images)
    if config.dataset == "synthetic_coco" and not coco_sized.is_complete(config.data_dir, rehearsed):
        return partial(coco_sized.draw, config.data_dir, rehearsed)
    return None


def check_backbone(config: RunConfig) -> str:
    """Look for damage to the weights that the trunk starts from, where it does; says what was found.

    Raises InputError, with how to fetch them.
    """
    if not config.trunk_weights:
        return "no ImageNet weights are read"
    path = Path(config.trunk_weights)
    try:
        return backbone_urls.check(path)
    except InputError as error:
        fetch = backbone_urls.how_to_fetch(config.trunk_name, path)
        raise InputError(
            f"{error}. Run {fetch}, or start at random: --pretrained-backbone '' --division open"
        ) from error


def check_data(
    config: RunConfig, system: System, *, segmentations: bool = False
) -> tuple[dict[str, coco.Split], list[str]]:
    """Read the splits and hold them against the settings; returns them and their counts, raises InputError.

    segmentations: with their masks.
    """
    if not config.train_images and not config.data_dir.is_dir():
        coco.layout(config.data_dir, "train", segmentations=segmentations)
    facts, mistakes = [], []
    splits: dict[str, coco.Split] = {}
    for name in config.reads_data:
        try:
            files = coco.files(config, name, segmentations=segmentations)
            split = coco.read(*files, skip_missing_images=config.skip_missing_images, segmentations=segmentations)
        except InputError as error:
            mistakes += str(error).splitlines()
            continue
        splits[name] = split
        without_boxes = len(split) - len(split.with_boxes())
        facts.append(
            f"{name}: {len(split)} images ({without_boxes} without boxes, {split.missing_images} missing), "
            f"{len(split.labels)} boxes ({split.dropped_boxes} more of zero size dropped, "
            f"{split.clipped_boxes} clipped at the border)"
        )
    if first := next(iter(splits.values()), None):
        try:
            coco.check_classes(config.num_classes, first)
        except InputError as error:
            mistakes.append(str(error))
    if train := splits.get("train"):
        facts.append(f"classes: background, {', '.join(category.name for category in train.categories)}")
        batch, images = config.global_batch_size(system.world_size), len(train.with_boxes())
        if batch > images:
            mistakes.append(
                f"batch_size {config.batch_size} on {system.world_size} ranks is {batch} images a step, and "
                f"{train.annotation_file} has {images} with boxes. Pass a smaller --batch-size"
            )
        if "val" in splits and splits["val"].categories != train.categories:
            mistakes.append(
                f"{splits['val'].annotation_file} has other categories than {train.annotation_file}. Give both the same"
            )
    if mistakes:
        raise InputError("\n".join(mistakes))
    return splits, facts


def make(folder: Path, config: RunConfig) -> None:
    """Make the run's folder; raises InputError if that is not possible or it holds this experiment's log."""
    log = run_dir.log_file(folder, config.run_index)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if log.exists() and config.resume == "none":
            raise InputError(
                f"{log} is there already: choose another RUN_DIR or RUN_INDEX, or go on with it by --resume auto"
            )
        trial = folder / f".{log.name}"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise InputError(f"run folder {folder} cannot be written ({error.strerror}): choose another LOGDIR") from error
