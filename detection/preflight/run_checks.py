"""Checks of a run before its timer starts: settings, rules, data, backbone, run folder.

`python -m WORKLOAD preflight [--dry-run] [--name value ...]` exits with 0, or with 2 and every mistake. It prints its
report to stderr and four lines to stdout for ./run_and_time.sh: organization, run folder, mode and number of classes.
--dry-run creates nothing, reports missing files as warnings, and prints verdict, report and the settings that differ
from the defaults to stdout; --all adds the others.
A violation of the closed division is an error in both cases. In the open division it is a note.

The checks run in a separate process, and the page cache is dropped afterwards: MLPerf forbids the timed process to
touch the data before run_start. Only checks of a named device, --weights and --resume import torch, which takes long.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from detection import git_state, run_dir, run_lock
from detection.checkpoint import backbone_urls
from detection.config.run_config import RunConfig
from detection.config.settings import InputError, LaunchLayout, ResolvedSettings, format_settings, read_launch_layout
from detection.data import coco, coco_arrays, worker_shm
from detection.data.num_classes import resolve_num_classes
from detection.engine import trackers
from detection.preflight import image_checks
from detection.synthetic import coco_scenes, coco_sized, toy
from mlperf import rules

if TYPE_CHECKING:
    from torch import nn

Config = TypeVar("Config", bound=RunConfig)

# COCO's images have at most 640x640 pixels, and few of its files are larger than 512 KiB.
MAX_IMAGE_BYTES = 3 * 640 * 640
MAX_FILE_BYTES = 2**19


@dataclass(frozen=True)
class PreflightSpec(Generic[Config]):
    """Preflight functions of one benchmark.

    load: read settings from flags. rule_values: values by the keys of `mlperf.rules`, for a number of ranks.
    image_bytes: size of an image from a worker. check_weights: describe a weights file, or raise InputError if it does
    not fit the network or, unless its last argument allows to initialize outputs, the classes. make_model: build the
    network for resolved num_classes. The last two may import torch. select_train_images: return the images to train
    on. segmentations: the benchmark trains masks.
    """

    load: Callable[[Sequence[str]], ResolvedSettings[Config]]
    rule_values: Callable[[Config, int], Mapping[str, object]]
    image_bytes: Callable[[Config], int]
    check_weights: Callable[[Path, Config, bool], str]
    make_model: Callable[[Config], "nn.Module"]
    select_train_images: Callable[[Config, coco.Split], coco.Split]
    segmentations: bool = False


def batch_bytes(config: Config, spec: PreflightSpec[Config]) -> int:
    """Return the size of a batch from a worker. With device preprocessing, this is the size before any caching."""
    image_bytes = spec.image_bytes(config)
    if config.device_preprocessing:
        image_bytes = MAX_FILE_BYTES if config.jpeg_decoder == "gpu" else MAX_IMAGE_BYTES
    return config.batch_size * image_bytes


def main(argv: Sequence[str], spec: PreflightSpec[Config]) -> int:
    """Run all checks and return the exit status. Raises InputError with all mistakes."""
    dry_run = "--dry-run" in argv
    resolved = spec.load([word for word in argv if word not in ("--dry-run", "--all")])
    config, layout = resolved.config, read_launch_layout()
    config.check_world_size(layout.world_size)
    notes, violations = check_rules(config, spec.rule_values(config, layout.world_size), layout.world_size)
    run_folder = config.run_folder(datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    info, errors = check_input(config, layout, spec, run_folder, generate_data=not dry_run)
    report = [*notes, *info, *check_source(config), f"run folder: {run_folder}"]
    if dry_run:
        verdict = f"would not start: {len(violations)} rules are broken" if violations else "would start"
        verdict += f", with {len(errors)} warnings" if errors else ""
        show_all = "--all" in argv
        title = "All settings" if show_all else "Settings that differ from the program's defaults (--all shows all)"
        lines = [f"The run {verdict}.", *(f"warning: {line}" for line in errors), *report, "", f"{title}:"]
        print(*lines, format_settings(resolved, changed_only=not show_all), sep="\n", flush=True)
        if violations:
            raise InputError("\n".join(violations))
        return 0
    print("\n".join(report), file=sys.stderr, flush=True)
    if errors or violations:
        raise InputError("\n".join(violations + errors))
    num_classes = resolve_num_classes(config).num_classes
    if layout.node_rank == 0:
        create_run_dir(run_folder, config)
    print(config.org, run_folder, config.mode, num_classes, sep="\n")
    return 0


def print_summary(argv: Sequence[str], spec: PreflightSpec[Config]) -> int:
    """Check only the settings, print the layers of the network, and return the exit status. Raises InputError."""
    config = with_num_classes(spec.load(argv).config)
    from detection.engine import model_summary  # imports torch

    print(model_summary.summarize_model(spec.make_model, config))
    return 0


def with_num_classes(config: Config) -> Config:
    """Return the settings with their number of classes, even if a synthetic data set does not exist yet."""
    if config.num_classes == 0 and pending_synthetic_data(config):
        categories = {"toy": toy.SHAPES, "synthetic_coco": coco_scenes.COCO_CATEGORIES}[config.dataset]
        return replace(config, num_classes=1 + len(categories))
    return resolve_num_classes(config)


def check_rules(config: RunConfig, rule_values: Mapping[str, object], world_size: int) -> tuple[list[str], list[str]]:
    """Check the settings against MLPerf's rules. Return notes and, in the closed division, violations."""
    if config.mode != "train":
        return [f"--mode {config.mode} is not an MLPerf run: no log, no check and no RESULT"], []
    fixed = rules.BENCHMARKS[config.benchmark].fixed
    values = {
        **asdict(config),
        **rule_values,
        "eval_epochs": tuple(block[-1] for block in config.eval_blocks()),
        "dataset": config.dataset,
        "network": config.network_name,
        "weights": config.weights or "none",
        "pretrained_backbone": config.pretrained_backbone or "none",
        "seed": "none" if config.seed is None else config.seed,
    }
    ruleset = f"MLPerf {config.ruleset} {config.division}"
    notes, violations, unchanged = [], [], []
    for check in rules.check_rules(config.benchmark, config.ruleset, config.division, values):
        if not check.passed:
            violations.append(f"{ruleset} forbids {check.rule}: {check.message}")
        elif check.rule in fixed:
            unchanged.append(check.rule)
        else:
            notes.append(f"{ruleset}: {check.rule}: {check.message}")
    if unchanged:
        notes.append(f"{ruleset}: same as the reference: {', '.join(unchanged)}")
    unrounded, peak = config.unrounded_peak_lr(world_size), config.peak_lr(world_size)
    is_exact = math.isclose(peak, unrounded, rel_tol=1e-9)
    rounded = "not rounded" if is_exact else f"rounded from {unrounded:.6g} by lr_round_to"
    notes.append(f"peak learning rate {peak:.6g}: {rounded}")
    if config.division == "closed":
        return notes, [f"{violation}. Change it, or pass --division open" for violation in violations]
    closed = rules.check_rules(config.benchmark, config.ruleset, "closed", values)
    notes += [f"warning: {violation}" for violation in violations]
    notes += [f"note: closed would reject {check.rule}: {check.message}" for check in closed if not check.passed]
    return notes, []


def check_source(config: RunConfig) -> list[str]:
    """Return a warning if the logs of a training could not be submitted, since their source is not a commit."""
    source = git_state.read(config.source_commit)
    if config.mode != "train" or source.dirty is False:
        return []
    if source.dirty:
        problem = f"files differ from commit {source.commit[:12]}. Commit them"
    else:
        problem = "unknown commit. Run from the git repository, or in an image built with --build-arg COMMIT,"
    return [f"warning: source: {problem} before runs for a submission, which rejects their logs otherwise"]


def check_input(
    config: Config, layout: LaunchLayout, spec: PreflightSpec[Config], run_folder: Path, *, generate_data: bool
) -> tuple[list[str], list[str]]:
    """Read everything that the run will read. Return information and errors.

    generate_data: generate a missing synthetic data set.
    """
    info, errors = [], []
    try:
        generate = pending_synthetic_data(config) if config.required_splits else None
        if generate and generate_data:
            generate()
        if not config.required_splits:
            info.append("no data set is read: the input is synthetic")
        elif generate and not generate_data:
            info.append(f"DATADIR={config.data_dir}: the synthetic images are generated when the run starts")
        else:
            info += check_data(config, layout, spec)[1]
    except InputError as error:
        errors += str(error).splitlines()
    except OSError as error:
        errors.append(f"DATADIR={config.data_dir}: {error.strerror}: {error.filename}")
    checks: list[Callable[[], str | None]] = [
        partial(worker_shm.check, config.num_workers * layout.ranks_per_node, batch_bytes(config, spec))
    ]
    checks.append(partial(trackers.require_packages, config))
    if config.device not in ("auto", "cpu"):
        checks.append(partial(check_device, config, layout))
    if config.resume != "none" and layout.node_rank == 0:  # the first rank reads it
        checks.append(partial(check_resume, config, spec, run_folder))
    if config.weights:
        checks.append(lambda: f"weights: {check_weights(config, config.weights, spec, initialize=config.trains)}")
    elif config.backbone_weights:
        checks.append(partial(check_backbone, config))
    for check in checks:
        try:
            info += filter(None, [check()])
        except InputError as error:
            errors.append(str(error))
    return info, errors


def pending_synthetic_data(config: RunConfig) -> Callable[[], bool] | None:
    """Return the function that generates the synthetic data set, or None if none is missing."""
    if config.dataset == "toy" and not any(config.data_dir.glob("*")):
        return partial(toy.generate, config.data_dir, toy.ToySpec())
    coco_sized_spec = coco_sized.CocoSizedSpec(config.synthetic_images)
    if config.dataset == "synthetic_coco" and not coco_sized.is_complete(config.data_dir, coco_sized_spec):
        return partial(coco_sized.generate, config.data_dir, coco_sized_spec)
    return None


def check_device(config: RunConfig, layout: LaunchLayout) -> None:
    """Raise InputError if the device of the settings is not available to every rank of this node."""
    from detection.runtime import device  # imports torch

    device.select_device(config.device, layout.ranks_per_node - 1)


def check_weights(config: Config, file: str, spec: PreflightSpec[Config], *, initialize: bool) -> str:
    """Describe a weights file. Raise InputError if it does not fit the network or, unless `initialize`, the classes."""
    return f"{file} ({spec.check_weights(Path(file), resolve_num_classes(config), initialize)})"


def check_resume(config: Config, spec: PreflightSpec[Config], run_folder: Path) -> str | None:
    """Describe the checkpoint that --resume selects, if any. Raise InputError if it does not fit the settings."""
    from detection.checkpoint import resume  # these import torch
    from detection.engine import optim
    from detection.engine.model_summary import make_meta_model

    selected = resume.select_checkpoint(config, run_folder, log=lambda _: None)  # the run warns of damaged ones
    if selected is None:
        return None
    path, state = selected
    description = check_weights(config, str(path), spec, initialize=False)
    groups = optim.group_parameters(
        make_meta_model(spec.make_model, resolve_num_classes(config)),
        weight_decay=config.weight_decay,
        weight_decay_on_bias_and_norm=config.weight_decay_on_bias_and_norm,
        bias_lr_factor=config.bias_lr_factor,
    )
    resume.check_optimizer(config, path, state, groups)
    resume.check_categories(config, path, state)
    return f"resume: {description}"


def check_backbone(config: RunConfig) -> str:
    """Verify the file of the pretrained backbone and return a description.

    Raises InputError with the command that downloads it.
    """
    if not config.backbone_weights:
        return "no ImageNet weights are read"
    path = Path(config.backbone_weights)
    try:
        return backbone_urls.verify_file(path)
    except InputError as error:
        fetch_command = backbone_urls.fetch_command(config.backbone_name, path)
        raise InputError(
            f"{error}. Run {fetch_command}, or start from random weights: --pretrained-backbone '' --division open"
        ) from error


def check_data(
    config: Config, layout: LaunchLayout, spec: PreflightSpec[Config]
) -> tuple[dict[str, coco.Split], list[str]]:
    """Read the splits and check them against the settings. Return the splits and a description. Raise InputError."""
    segmentations = spec.segmentations
    if not config.val_images and not config.data_dir.is_dir():
        coco.dataset_paths(config, "train", segmentations=segmentations)
    info, errors = [], []
    splits: dict[str, coco.Split] = {}
    for name in config.required_splits:
        try:
            split = coco.read_split(config, name, segmentations=segmentations)
            if train := splits.get("train"):
                split = coco.align_categories(split, train)
        except InputError as error:
            errors += str(error).splitlines()
            continue
        splits[name] = split
        arrays_file = coco_arrays.arrays_path(split.annotation_file)
        if arrays_file.exists() and not segmentations and not coco_arrays.read_arrays(split.annotation_file):
            info.append(
                f"warning: {arrays_file}: damaged, or older than {split.annotation_file.name}, and not used. "
                f"Run python -m detection.data.coco_arrays {split.annotation_file}"
            )
        num_empty = len(split) - len(split.drop_empty_images())
        info.append(
            f"{name}: {len(split)} images ({num_empty} without boxes, {split.num_missing_images} missing), "
            f"{len(split.labels)} boxes ({split.num_dropped_boxes} of zero size dropped, "
            f"{split.num_clipped_boxes} clipped to the image)"
        )
        if not split.is_labeled:
            info.append(f"{split.annotation_file}: no annotations: the run writes its detections, and no AP")
        info += [f"warning: {split.annotation_file}: {remark}" for remark in split.remarks]
        if config.has_custom_data:
            header_info, header_errors = image_checks.check_headers(name, split)
            info += header_info
            errors += header_errors
    if first := next(iter(splits.values()), None):
        try:
            coco.check_num_classes(config.num_classes, first)
        except InputError as error:
            errors.append(str(error))
    if "val" in splits:
        try:
            coco.check_evaluable(splits["val"])
        except InputError as error:
            errors.append(str(error))
    if train := splits.get("train"):
        info.append(f"classes: background, {', '.join(category.name for category in train.categories)}")
        global_batch = config.global_batch_size(layout.world_size)
        num_images = len(spec.select_train_images(config, train))
        if global_batch > num_images:
            errors.append(
                f"batch_size {config.batch_size} on {layout.world_size} ranks is {global_batch} images per step, but "
                f"{train.annotation_file} has {num_images} images to train on. Pass a smaller --batch-size"
            )
    if errors:
        raise InputError("\n".join(errors))
    return splits, info


def create_run_dir(run_folder: Path, config: RunConfig) -> None:
    """Create the run folder.

    Raises InputError if it cannot be written, is in use by another run, or contains the log of this run index.
    """
    log = run_dir.log_path(run_folder, config.run_index)
    with run_lock.hold(run_folder):
        if log.exists() and config.resume == "none":
            raise InputError(
                f"{log} already exists. Choose another RUN_DIR or RUN_INDEX, or continue the run with --resume auto"
            )
