"""MLPerf training rules for a run's schedule, targets and hyperparameters, checked before the run starts.

Rules on logged values come from the installed checkers of mlperf_logging (mlperf/requirements.py and
mlperf/reference_points.py). This module adds what no file of theirs states: the rules table of
mlcommons/training_policies, and the fixed settings of the references. The stricter rule applies, so a recipe that
passes here passes both.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from mlperf import reference_points, requirements
from mlperf.reference_points import ReferencePoint
from mlperf.requirements import RULESETS as RULESETS

DIVISIONS = ("closed", "open")


@dataclass(frozen=True)
class Constraint:
    """Rule of the closed division for one value, which the checker does not know or does not test.

    key: the MLPerf key, or one of `NOT_IN_LOG`. allowed: the rule in words, for messages. predicate: the rule in code.
    depends_on: key of a second argument of `predicate`.
    """

    key: str
    allowed: str
    predicate: Callable[..., bool]
    depends_on: str = ""


@dataclass(frozen=True)
class Rules:
    """Rules of one benchmark, in all rulesets that have it.

    title: name for messages. names: ruleset to MLPerf's name of the benchmark. dataset: name of its data set.
    epoch_images: training images of an epoch. fixed_eval_epochs: ruleset to the epochs to evaluate after. Other
    rulesets evaluate every `eval_every` epochs. constraints: in addition to the checker's. fixed: setting to the
    reference's value, which the closed division requires and no log records. constrained: settings that determine the
    value of a constraint of another name. free: settings that the closed division leaves open. It rejects a setting
    that is in none of these, and is not the key of a constraint.
    """

    title: str
    names: Mapping[str, str]
    dataset: str
    epoch_images: int
    eval_every: int
    constraints: tuple[Constraint, ...]
    fixed: Mapping[str, object]
    constrained: frozenset[str]
    free: frozenset[str]
    fixed_eval_epochs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class RuleCheck:
    """Result of checking one value. rule: the key of the value. message: the actual and the allowed value."""

    rule: str
    passed: bool
    message: str


# Keys that `check_rules` needs in addition to the keys of a log.
NOT_IN_LOG = ("dataset", "network", "weights", "pretrained_backbone", "seed", "eval_epochs")

_CONSTRAINED = frozenset({
    "batch_size", "grad_accum_steps", "base_lr", "lr_round_to", "warmup_steps", "warmup_factor", "epochs", "target",
})  # fmt: skip
_FREE = frozenset({
    # The run, its data (also checked by the name of the data set), its files and its submission.
    "mode", "benchmark_input", "benchmark_steps", "benchmark_warmup", "eval_before_training", "max_steps", "resume",
    "data_dir", "train_images", "train_annotations", "val_images", "val_annotations", "synthetic_images", "num_classes",
    "log_dir", "run_dir", "run_index", "summary_json", "tensorboard", "wandb", "mlflow", "log_every",
    "checkpoint_every", "echo_log", "system", "ruleset", "division", "org", "platform", "availability", "source_commit",
    "page_cache_dropped",
    # Computation: numerics, memory, and the order and sharding of the data.
    "device", "precision", "gradient_dtype", "numa_binding", "compile", "optimizer_backend", "channels_last",
    "last_batch", "num_workers", "jpeg_decoder", "image_cache", "image_cache_gib", "eval_batch_size",
    "coco_eval_backend", "step_timeout_s",
})  # fmt: skip

_COMMON = (
    Constraint("weights", "none: only the backbone may be pretrained", lambda name: name == "none"),
    Constraint("pretrained_backbone", "ImageNet weights, as in the reference", lambda name: name != "none"),
    Constraint("seed", "none: taken from the clock or the system's randomness", lambda seed: seed == "none"),
)


def _is_scaled_40_50(epochs: Any) -> bool:
    # The checker's yaml has the key CHECK twice, so it only tests the second epoch. The rule has one k.
    if len(epochs) != 2 or min(epochs) <= 0:
        return False
    tenths = [10 * epochs[0] / 40, 10 * epochs[1] / 50]
    return all(abs(tenth - round(tenths[0])) < 1e-5 for tenth in tenths)


SSD = Rules(
    title="SSD300",
    names=dict.fromkeys(RULESETS[:3], "ssd"),
    dataset="coco2017",
    epoch_images=117_266,  # with boxes
    eval_every=5,
    fixed_eval_epochs={"0.7.0": (40, 50, 55, 60, 65, 70, 75, 80)},
    constraints=(
        Constraint("opt_learning_rate_decay_boundary_epochs", "[40, 50]·(1 + k/10), k an integer", _is_scaled_40_50),
        Constraint("network", "ssd300-r34", lambda name: name == "ssd300-r34"),
    ),
    fixed={
        "optimizer": "sgd",
        "momentum": 0.9,
        "lr_decay_factor": 0.1,
        "weight_decay_on_bias_and_norm": True,
        "bias_lr_factor": 1.0,
        "freeze_batch_norm": False,
        "crop": True,
        "flip": "horizontal",
        "jitter": True,
        "nms_threshold": 0.5,
        "score_threshold": 0.05,
        "max_detections": 200,
        "eval_images": "with-boxes",
        "skip_missing_images": False,
        "background_images": "drop",
        "exif": "auto",  # as stored, since the data set's sizes are
    },
    constrained=_CONSTRAINED | {"bn_group", "weight_decay", "lr_decay_epochs", "backbone"},
    free=_FREE,
)


def _is_scaled_60000_80000(steps: Any, global_batch_size: int) -> bool:
    """Return whether steps are (60,000, 80,000)·(1 + K/10)·16/GBS for one integer K, rounded up or down.

    This K differs from the learning rate's K: the recipes for GBS 48, 64 and 96 have K = 2 here (24,000 and 32,000,
    18,000 and 24,000, 12,000 and 16,000) and 3, 4 and 6 there. The rule's steps are rarely integers, and its text
    does not define rounding. The reference at GBS 272 truncates 5,294.1 and 7,058.8 (K = 5) to 5,294 and 7,058, so
    both neighbors are allowed. The checker itself only counts the steps.
    """
    if len(steps) != 2 or min(*steps, global_batch_size) < 1:
        return False
    scale = steps[1] * global_batch_size / 16 / 80_000
    nearest_k = round(10 * (scale - 1))
    return any(
        all(
            abs(step - unscaled * (1 + k / 10) * 16 / global_batch_size) < 1
            for step, unscaled in zip(steps, (60_000, 80_000), strict=True)
        )
        for k in (nearest_k - 1, nearest_k, nearest_k + 1)
    )


MASKRCNN = Rules(
    title="Mask R-CNN",
    names=dict.fromkeys(RULESETS[:7], "maskrcnn"),
    dataset="coco2017",
    epoch_images=117_266,  # with boxes
    eval_every=1,
    constraints=(
        Constraint(
            "opt_learning_rate_decay_steps",
            "(60000, 80000)·(1 + K/10)·16/global batch, K an integer, rounded up or down",
            _is_scaled_60000_80000,
            depends_on="global_batch_size",
        ),
        Constraint(
            "num_image_candidates",
            "1000 per image of a rank's batch",
            lambda candidates, batch_size: candidates == 1000 * batch_size,
            depends_on="batch_size",
        ),
        Constraint("min_image_size", "800 px", lambda pixels: pixels == 800),
        Constraint("max_image_size", "1333 px", lambda pixels: pixels == 1333),
    ),
    fixed={
        "optimizer": "sgd",
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "weight_decay_on_bias_and_norm": False,
        "bias_lr_factor": 2.0,
        "lr_schedule_first": True,
        "freeze_batch_norm": True,
        "backbone": "resnet50",
        "stride_in_1x1": True,
        "freeze_at": 1,
        "input_format": "caffe-bgr",
        "batch_norm_eps": 0.0,
        "legacy_boxes": True,
        "anchor_sizes": (32, 64, 128, 256, 512),
        "drop_straddling": True,
        "rpn_pre_nms_top_n": 2000,
        "rpn_pre_nms_top_n_eval": 1000,
        "rpn_post_nms_top_n_eval": 1000,
        "proposals_per_batch": True,
        "rpn_nms_threshold": 0.7,
        "rpn_batch_size_per_image": 256,
        "rpn_positive_fraction": 0.5,
        "box_batch_size_per_image": 512,
        "box_positive_fraction": 0.25,
        "box_smooth_l1_beta": 1.0,
        "zero_mask_biases": True,
        "mask_targets": "polygon",
        "flip": True,
        "nms_threshold": 0.5,
        "score_threshold": 0.05,
        "max_detections": 100,
        "eval_images": "all",
        "skip_missing_images": False,
        "background_images": "drop",
        "exif": "auto",  # as stored, since the data set's sizes are
    },
    constrained=_CONSTRAINED | {"lr_decay_images", "lr_decay_factor", "rpn_post_nms_top_n_per_image", "mask_target"},
    # Batch norm is frozen. A variant is a set of defaults, each of which is fixed.
    free=_FREE | {"bn_group", "variant", "roi_align", "warmup_method", "group_by_aspect_ratio"},
)

RETINANET = Rules(
    title="RetinaNet",
    names=dict.fromkeys(RULESETS[3:9], "ssd") | dict.fromkeys(RULESETS[9:], "retinanet"),
    dataset="openimages-mlperf",
    epoch_images=1_170_301,
    eval_every=1,
    constraints=(
        Constraint("opt_learning_rate_warmup_epochs", "an integer ≥ 0", lambda epochs: epochs >= 0 and epochs % 1 == 0),
    ),
    fixed={
        "weight_decay_on_bias_and_norm": True,
        "bias_lr_factor": 1.0,
        "freeze_batch_norm": True,
        "backbone": "resnext50_32x4d",
        "freeze_at": 1,
        "pyramid_channels": 256,
        "head_init_std": 0.01,
        "image_size": 800,
        "anchor_sizes": (32, 64, 128, 256, 512),
        "flip": True,
        "train_crowds": True,
        "nms_threshold": 0.5,
        "score_threshold": 0.05,
        "pre_nms_top_n": 1000,
        "max_detections": 300,
        "eval_images": "all",
        "skip_missing_images": False,
        "background_images": "keep",
        "exif": "auto",  # as stored, since the data set's sizes are
    },
    constrained=_CONSTRAINED - {"lr_round_to", "warmup_steps"} | {"optimizer", "weight_decay", "warmup_epochs"},
    # Batch norm is frozen, and Adam has no momentum.
    free=_FREE | {"bn_group", "momentum"},
)

BENCHMARKS: Mapping[str, Rules] = {"ssd": SSD, "maskrcnn": MASKRCNN, "retinanet": RETINANET}


def mlperf_name(benchmark: str, ruleset: str) -> str:
    """Return MLPerf's name of a benchmark in a ruleset. A workload without rules keeps its own name."""
    return BENCHMARKS[benchmark].names[ruleset] if benchmark in BENCHMARKS else benchmark


def identify_benchmark(name: str, ruleset: str = "", keys: Collection[str] = ()) -> str:
    """Return the benchmark that a log means by a name, or "" if this program has none.

    ruleset: that of the log, or "" if it names none. keys: its keys, which tell two benchmarks of one name apart.
    """
    candidates = [
        benchmark
        for benchmark, rules in BENCHMARKS.items()
        if (rules.names.get(ruleset) == name if ruleset else name in rules.names.values())
    ]
    if len(candidates) > 1:
        candidates.sort(key=lambda benchmark: len(set(hyperparameter_keys(benchmark)).difference(keys)))
    return candidates[0] if candidates else ""


def newest_ruleset(benchmark: str, name: str = "") -> str:
    """Return the newest ruleset of a benchmark, or the newest one in which it has a name."""
    names = BENCHMARKS[benchmark].names
    return [ruleset for ruleset in names if name in ("", names[ruleset])][-1]


def require_ruleset(benchmark: str, ruleset: str) -> str:
    """Return the ruleset. Raises ValueError if it does not have the benchmark."""
    rulesets = tuple(BENCHMARKS[benchmark].names) if benchmark in BENCHMARKS else RULESETS
    if ruleset not in rulesets:
        problem = f"has no {BENCHMARKS[benchmark].title}" if ruleset in RULESETS else "unknown ruleset"
        raise ValueError(f"{problem}. Choose one of {', '.join(rulesets)}.")
    return ruleset


def scheduled_eval_epochs(benchmark: str, ruleset: str, last_epoch: int) -> tuple[int, ...]:
    """Return the epochs, from 1 to last_epoch, after which the ruleset requires an evaluation."""
    rules = BENCHMARKS[benchmark]
    every = range(rules.eval_every, last_epoch + 1, rules.eval_every)
    return tuple(epoch for epoch in rules.fixed_eval_epochs.get(ruleset, every) if epoch <= last_epoch)


@cache
def hyperparameter_keys(benchmark: str) -> tuple[str, ...]:
    """Return the keys that a run logs exactly once each.

    They are the keys of all rulesets. A ruleset allows unknown keys, so a run can log all of them.
    """
    names = BENCHMARKS[benchmark].names
    keys = (key for ruleset, name in names.items() for key in requirements.keys_logged_once(ruleset, name))
    return tuple(dict.fromkeys(keys))


def tensor_names(benchmark: str) -> list[str]:
    """Return the names of the initialized tensors in the newest ruleset that requires them, in network order."""
    lists = (requirements.tensor_names(ruleset, name) for ruleset, name in BENCHMARKS[benchmark].names.items())
    return [names for names in lists if names][-1]


def targets(benchmark: str) -> dict[str, float]:
    """Return the minimum value of each metric that ends a closed run."""
    ruleset = newest_ruleset(benchmark)
    minima = requirements.minimum_accuracy(ruleset, mlperf_name(benchmark, ruleset))
    return {{"SEGM": "mask_AP"}.get(key, "AP"): minimum for key, minimum in minima.items()}


def reference_points_of(benchmark: str, ruleset: str) -> tuple[ReferencePoint, ...]:
    """Return the reference convergence points of a benchmark. Ruleset 0.7.0 has none."""
    return reference_points.read(ruleset, mlperf_name(benchmark, ruleset))


def nearest_reference_points(benchmark: str, ruleset: str) -> tuple[ReferencePoint, ...]:
    """Return the reference convergence points of a benchmark, for ruleset 0.7.0 those of 1.0.0."""
    return reference_points_of(benchmark, ruleset) or reference_points_of(benchmark, "1.0.0")


def declared_settings(benchmark: str) -> list[str]:
    """Return every key and setting of the benchmark's rules, each once."""
    rules = BENCHMARKS[benchmark]
    keys = ["dataset", "eval_accuracy", "eval_epochs", *hyperparameter_keys(benchmark)]
    keys += [constraint.key for constraint in (*_COMMON, *rules.constraints)]
    return [*dict.fromkeys(keys), *rules.fixed, *rules.constrained, *rules.free]


def check_rules(benchmark: str, ruleset: str, division: str, values: Mapping[str, object]) -> list[RuleCheck]:
    """Check a run against the rules before it starts.

    values: values by log key, in the order of the log, with the targets as `eval_accuracy`. Also the keys of
    `NOT_IN_LOG` that apply to this benchmark: `eval_epochs` (a sequence), `dataset`, `network` (SSD only), `weights`
    and `pretrained_backbone` (a file, or "none") and `seed` (the user's choice, or "none"). A value that is missing or
    None fails. It also holds the settings by name. In the closed division, those in `fixed` are compared with the
    reference's value, and one that `Rules` does not declare fails.
    Raises ValueError for an unknown benchmark or division, or a ruleset without the benchmark.
    """
    if benchmark not in BENCHMARKS or division not in DIVISIONS:
        raise ValueError(f"{benchmark}, {division}: unknown. Choose one of {', '.join((*BENCHMARKS, *DIVISIONS))}.")
    rules, name = BENCHMARKS[benchmark], mlperf_name(benchmark, require_ruleset(benchmark, ruleset))
    records = requirements.key_records(ruleset, division, name)
    logged = {key: value for key, value in values.items() if key in records}
    failing = requirements.failing_keys(ruleset, division, name, logged | dict.fromkeys(records.keys() - logged.keys()))
    dataset = Constraint("dataset", rules.dataset, lambda dataset: dataset == rules.dataset)
    constraints = {c.key: c for c in (dataset, *_COMMON, *rules.constraints)} if division == "closed" else {}

    checks = []
    for key in dict.fromkeys([*records, *constraints]):
        value, passed = values.get(key), key not in failing
        allowed = requirements.describe(records.get(key, {}))
        if constraint := constraints.get(key):
            operands = [value, *([values.get(constraint.depends_on)] if constraint.depends_on else [])]
            passed = passed and None not in operands and constraint.predicate(*operands)
            allowed = constraint.allowed
        actual = "not given" if value is None else value
        checks.append(RuleCheck("target" if key == "eval_accuracy" else key, passed, f"{actual} (allowed: {allowed})"))
    if division == "open":
        checks.append(RuleCheck("dataset", True, f"{values.get('dataset')} (any, in the open division)"))
        return checks

    for setting, reference in rules.fixed.items():
        if setting in values:
            message = f"{values[setting]} (allowed: {reference}, as in the reference)"
            checks.append(RuleCheck(setting, values[setting] == reference, message))
    undeclared = values.keys() - set(declared_settings(benchmark)) - set(NOT_IN_LOG)
    checks += [RuleCheck(key, False, "no rule for this setting. Declare it in mlperf/rules.py") for key in undeclared]
    checks.append(_check_eval_epochs(benchmark, ruleset, values.get("eval_epochs")))
    global_batch_size = values.get("global_batch_size")
    if values.get("dataset") == rules.dataset and isinstance(global_batch_size, int):
        checks.append(_check_convergence(benchmark, ruleset, global_batch_size))
    return checks


def _check_eval_epochs(benchmark: str, ruleset: str, eval_epochs: Any) -> RuleCheck:
    epochs = tuple(eval_epochs or ())
    schedule = scheduled_eval_epochs(benchmark, ruleset, last_epoch=max(epochs, default=0))
    if epochs and epochs == schedule:
        return RuleCheck("eval_epochs", True, f"{epochs}, as scheduled in {ruleset}")
    rules = BENCHMARKS[benchmark]
    fixed = rules.fixed_eval_epochs.get(ruleset)
    every = "every epoch" if rules.eval_every == 1 else f"every {rules.eval_every} epochs"
    allowed = f"after epochs {fixed}" if fixed else every
    return RuleCheck("eval_epochs", False, f"{epochs or 'not given'} (allowed: {allowed})")


def _check_convergence(benchmark: str, ruleset: str, global_batch_size: int) -> RuleCheck:
    """Name the reference points that rcp_checker compares a submission of this global batch with."""
    rule = "reference_convergence"
    points = [point for point in reference_points_of(benchmark, ruleset) if not point.pruned]
    if not points:
        return RuleCheck(rule, True, f"ruleset {ruleset} has no reference points")
    above = next((index for index, point in enumerate(points) if point.global_batch_size >= global_batch_size), None)
    if above is None:
        largest = points[-1].global_batch_size
        message = f"no reference point at or above batch {global_batch_size}, the largest is at {largest}"
        return RuleCheck(rule, False, message)
    point = points[above]
    if above == 0 or point.global_batch_size == global_batch_size:
        return RuleCheck(
            rule,
            True,
            f"compared with the reference at batch {point.global_batch_size}: {point.mean_epochs:.4g} epochs,"
            f" runs must average at least {point.min_epochs:.4g}",
        )
    below = points[above - 1]
    return RuleCheck(
        rule,
        True,
        f"compared with the line between the references at batch {below.global_batch_size} ({below.mean_epochs:.4g}"
        f" epochs) and {point.global_batch_size} ({point.mean_epochs:.4g})",
    )
