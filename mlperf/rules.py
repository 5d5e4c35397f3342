"""MLPerf training rules for a run's schedule, targets and hyperparameters, checked before the run starts.

Sources: the rules table of mlcommons/training_policies and the yaml files of mlperf_logging's compliance
checker. Where they differ, the stricter rule applies, so a recipe that passes here passes both.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

RULESETS = ("0.7.0", "1.0.0", "1.1.0")
DIVISIONS = ("closed", "open")

_SINCE_1_0 = RULESETS[1:]


@dataclass(frozen=True)
class Constraint:
    """Rule for one value.

    key: the MLPerf key, or one of `NOT_IN_LOG`. allowed: the rule in words, for messages. predicate: the rule in code.
    rulesets, divisions: where the rule applies. depends_on: key of a second argument of `predicate`.
    """

    key: str
    allowed: str
    predicate: Callable[..., bool]
    rulesets: tuple[str, ...] = RULESETS
    divisions: tuple[str, ...] = ("closed",)
    depends_on: str = ""


@dataclass(frozen=True)
class ReferencePoint:
    """Reference convergence point (RCP), as mlperf_logging's rcp_checker computes it from the reference's runs.

    global_batch_size: images per step. mean_epochs: epochs to the target, without the fastest and the slowest run.
    min_epochs: minimum mean of a submission. pruned: the checker drops the point, because it converges slower than
    the line between its neighbors or slower than a larger batch.
    """

    global_batch_size: int
    mean_epochs: float
    min_epochs: float
    rulesets: tuple[str, ...] = _SINCE_1_0
    pruned: bool = False


@dataclass(frozen=True)
class Rules:
    """Rules of one benchmark.

    targets: metric to the minimum value that ends a run. fixed_eval_epochs: ruleset to the epochs to evaluate after.
    Other rulesets evaluate every `eval_every` epochs. fixed: setting to the reference's value, which the closed
    division requires and no log records. constrained: settings that determine the value of a constraint of another
    name. free: settings that the closed division leaves open. It rejects a setting that is in none of these, and is not
    the key of a constraint.
    """

    targets: Mapping[str, float]
    eval_every: int
    fixed_eval_epochs: Mapping[str, tuple[int, ...]]
    constraints: tuple[Constraint, ...]
    fixed: Mapping[str, object]
    constrained: frozenset[str]
    free: frozenset[str]
    reference_points: tuple[ReferencePoint, ...]


@dataclass(frozen=True)
class RuleCheck:
    """Result of checking one value. rule: the key of the value. message: the actual and the allowed value."""

    rule: str
    passed: bool
    message: str


# Keys that `check_rules` needs in addition to the keys of a log.
NOT_IN_LOG = ("dataset", "network", "weights", "pretrained_backbone", "seed", "target", "mask_target", "eval_epochs")

_CONSTRAINED = frozenset(
    {"batch_size", "grad_accum_steps", "base_lr", "lr_round_to", "warmup_steps", "warmup_factor", "epochs"}
)
_FREE = frozenset({
    # The run, its data (also checked by the name of the data set), its files and its submission.
    "mode", "benchmark_input", "benchmark_steps", "benchmark_warmup", "eval_before_training", "max_steps", "resume",
    "data_dir", "train_images", "train_annotations", "val_images", "val_annotations", "synthetic_images", "num_classes",
    "log_dir", "run_dir", "run_index", "summary_json", "tensorboard", "log_every", "checkpoint_every", "echo_log",
    "system", "ruleset", "division", "org", "platform", "availability", "source_commit", "page_cache_dropped",
    # Computation: numerics, memory, and the order and sharding of the data.
    "device", "precision", "gradient_dtype", "numa_binding", "compile", "optimizer_backend", "channels_last",
    "last_batch", "num_workers", "jpeg_decoder", "image_cache", "image_cache_gib", "eval_batch_size",
    "coco_eval_backend", "step_timeout_s",
})  # fmt: skip

_SSD_TARGET = 0.23
_BOX_TARGET, _MASK_TARGET = 0.377, 0.339

_DATASET = Constraint("dataset", "coco2017", lambda name: name == "coco2017")
_WEIGHTS = Constraint("weights", "none: only the backbone may be pretrained", lambda name: name == "none")
_PRETRAINED_BACKBONE = Constraint(
    "pretrained_backbone", "ImageNet weights, as in the reference", lambda name: name != "none"
)
_SEED = Constraint("seed", "none: taken from the clock or the system's randomness", lambda seed: seed == "none")
_ACCUMULATION = Constraint("gradient_accumulation_steps", "≥ 1", lambda steps: steps >= 1, rulesets=_SINCE_1_0)


def _target_constraints(key: str, minimum: float) -> tuple[Constraint, ...]:
    """Return the constraints of the target `key`. From 1.0, the open division has no minimum."""

    def in_range(target: float) -> bool:
        return minimum <= target < 1

    allowed = f"≥ {minimum} and < 1"
    return (
        Constraint(key, allowed, in_range),
        Constraint(key, allowed, in_range, rulesets=("0.7.0",), divisions=("open",)),
        Constraint(key, "< 1", lambda target: target < 1, rulesets=_SINCE_1_0, divisions=("open",)),
    )


def _is_scaled_40_50(epochs: Any) -> bool:
    # The checker's yaml has the key CHECK twice, so it only tests the second epoch. The rule has one k.
    if len(epochs) != 2 or min(epochs) <= 0:
        return False
    tenths = [10 * epochs[0] / 40, 10 * epochs[1] / 50]
    return all(abs(tenth - round(tenths[0])) < 1e-5 for tenth in tenths)


SSD = Rules(
    targets={"AP": _SSD_TARGET},
    eval_every=5,
    fixed_eval_epochs={"0.7.0": (40, 50, 55, 60, 65, 70, 75, 80)},
    constraints=(
        Constraint("global_batch_size", "≥ 1 image", lambda size: size >= 1),
        Constraint("model_bn_span", "≥ 1 image", lambda images: images >= 1),
        # Published logs have multiples of 2.5e-3, because their submitters rounded. No rule requires it.
        Constraint("opt_base_learning_rate", "> 0, after warm-up and before decay", lambda rate: rate > 0),
        Constraint("opt_weight_decay", "≥ 0", lambda decay: decay >= 0),
        Constraint("opt_learning_rate_warmup_steps", "≥ 1", lambda steps: steps >= 1),
        Constraint("opt_learning_rate_warmup_factor", "≥ 0", lambda factor: factor >= 0),
        Constraint("opt_learning_rate_decay_boundary_epochs", "[40, 50]·(1 + k/10), k an integer", _is_scaled_40_50),
        Constraint("max_samples", "1 or 50", lambda samples: samples in (1, 50)),
        _ACCUMULATION,
        _DATASET,
        Constraint("network", "ssd300-r34", lambda name: name == "ssd300-r34"),
        _WEIGHTS,
        _PRETRAINED_BACKBONE,
        _SEED,
        *_target_constraints("target", _SSD_TARGET),
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
    },
    constrained=_CONSTRAINED | {"bn_group", "weight_decay", "lr_decay_epochs", "backbone"},
    free=_FREE,
    reference_points=(
        ReferencePoint(1024, 50, 50),
        ReferencePoint(1536, 55, 55, rulesets=("1.1.0",)),
        ReferencePoint(2048, 65.1, 64.2, pruned=True),
        ReferencePoint(4096, 87, 84.5),
    ),
)


def _is_multiple_of(unit: float) -> Callable[[float], bool]:
    def predicate(value: float) -> bool:
        return value > 0 and abs(value / unit - round(value / unit)) < 1e-5  # the tolerance of the checker's is_integer

    return predicate


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
    targets={"AP": _BOX_TARGET, "mask_AP": _MASK_TARGET},
    eval_every=1,
    fixed_eval_epochs={},
    constraints=(
        Constraint("global_batch_size", "≥ 1 image", lambda size: size >= 1),
        Constraint("opt_base_learning_rate", "0.02·K, K an integer ≥ 1", _is_multiple_of(0.02)),
        Constraint("opt_learning_rate_warmup_steps", "≥ 0", lambda steps: steps >= 0),
        Constraint("opt_learning_rate_warmup_factor", "> 0", lambda factor: factor > 0),
        Constraint("opt_learning_rate_decay_factor", "0.1", lambda factor: factor == 0.1),
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
        _ACCUMULATION,
        _DATASET,
        _WEIGHTS,
        _PRETRAINED_BACKBONE,
        _SEED,
        *_target_constraints("target", _BOX_TARGET),
        *_target_constraints("mask_target", _MASK_TARGET),
    ),
    fixed={
        "optimizer": "sgd",
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "weight_decay_on_bias_and_norm": False,
        "bias_lr_factor": 2.0,
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
        "mask_targets": "polygon",
        "flip": True,
        "nms_threshold": 0.5,
        "score_threshold": 0.05,
        "max_detections": 100,
        "eval_images": "all",
        "skip_missing_images": False,
    },
    constrained=_CONSTRAINED | {"lr_decay_images", "lr_decay_factor", "rpn_post_nms_top_n_per_image"},
    # Batch norm is frozen. A variant is a set of defaults, each of which is fixed.
    free=_FREE | {"bn_group", "variant", "roi_align", "group_by_aspect_ratio"},
    reference_points=(
        ReferencePoint(48, 14, 14),
        ReferencePoint(64, 14, 11.8),
        ReferencePoint(96, 14.06, 13.64, pruned=True),
        ReferencePoint(128, 14, 14),
        ReferencePoint(256, 17, 16.6, pruned=True),
        ReferencePoint(272, 17.1, 16.5),
    ),
)

BENCHMARKS: Mapping[str, Rules] = {"ssd": SSD, "maskrcnn": MASKRCNN}


def scheduled_eval_epochs(benchmark: str, ruleset: str, last_epoch: int) -> tuple[int, ...]:
    """Return the epochs, from 1 to last_epoch, after which the ruleset requires an evaluation."""
    _require("benchmark", benchmark, BENCHMARKS)
    _require("ruleset", ruleset, RULESETS)
    rules = BENCHMARKS[benchmark]
    every = range(rules.eval_every, last_epoch + 1, rules.eval_every)
    return tuple(epoch for epoch in rules.fixed_eval_epochs.get(ruleset, every) if epoch <= last_epoch)


def hyperparameter_keys(benchmark: str) -> tuple[str, ...]:
    """Return the keys that a run logs exactly once each.

    They are the keys of all rulesets. A ruleset allows unknown keys, so a run can log all of them.
    """
    _require("benchmark", benchmark, BENCHMARKS)
    keys = (constraint.key for constraint in BENCHMARKS[benchmark].constraints)
    return tuple(dict.fromkeys(key for key in keys if key not in NOT_IN_LOG))


def declared_settings(benchmark: str) -> list[str]:
    """Return every key and setting of the benchmark's rules, each once."""
    rules = BENCHMARKS[benchmark]
    keys = dict.fromkeys(constraint.key for constraint in rules.constraints)
    return [*keys, "eval_epochs", *rules.fixed, *rules.constrained, *rules.free]


def check_rules(benchmark: str, ruleset: str, division: str, hyperparameters: Mapping[str, object]) -> list[RuleCheck]:
    """Check a run against the rules before it starts.

    hyperparameters: values by log key, and the keys of `NOT_IN_LOG` that apply to this benchmark: `target` (box mAP),
    `mask_target` (mask mAP, Mask R-CNN only), `eval_epochs` (a sequence), `dataset` ("coco2017" or another name),
    `network` (SSD only), `weights` and `pretrained_backbone` (a file, or "none") and `seed` (the user's choice, or
    "none"). A value that is missing or None fails. It also holds the settings by name. In the closed division, those in
    `fixed` are compared with the reference's value, and one that `Rules` does not declare fails.
    Raises ValueError for an unknown benchmark, ruleset or division.
    """
    _require("benchmark", benchmark, BENCHMARKS)
    _require("ruleset", ruleset, RULESETS)
    _require("division", division, DIVISIONS)
    rules = BENCHMARKS[benchmark]

    checks = []
    for constraint in rules.constraints:
        if ruleset in constraint.rulesets and division in constraint.divisions:
            value = hyperparameters.get(constraint.key)
            actual = "not given" if value is None else f"{value}"
            operands = [value, hyperparameters.get(constraint.depends_on)] if constraint.depends_on else [value]
            passed = None not in operands and constraint.predicate(*operands)
            checks.append(RuleCheck(constraint.key, passed, f"{actual} (allowed: {constraint.allowed})"))
    if division == "open":
        checks.append(RuleCheck("dataset", True, f"{hyperparameters.get('dataset')} (any, in the open division)"))
        return checks

    for name, reference in rules.fixed.items():
        if name in hyperparameters:
            value = hyperparameters[name]
            checks.append(RuleCheck(name, value == reference, f"{value} (allowed: {reference}, as in the reference)"))
    undeclared = hyperparameters.keys() - {*NOT_IN_LOG, *declared_settings(benchmark)}
    checks += [RuleCheck(name, False, "no rule for this setting. Declare it in mlperf/rules.py") for name in undeclared]
    checks.append(_check_eval_epochs(benchmark, ruleset, hyperparameters.get("eval_epochs")))
    points = [point for point in rules.reference_points if ruleset in point.rulesets and not point.pruned]
    global_batch_size = hyperparameters.get("global_batch_size")
    if not points:
        checks.append(RuleCheck("reference_convergence", True, f"ruleset {ruleset} has no reference points"))
    elif isinstance(global_batch_size, int):
        checks.append(_check_convergence(points, global_batch_size))
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


def _check_convergence(points: list[ReferencePoint], global_batch_size: int) -> RuleCheck:
    """Name the reference points that rcp_checker compares a submission of this global batch with."""
    rule = "reference_convergence"
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
            f"compared with the reference at batch {point.global_batch_size}: {point.mean_epochs:g} epochs,"
            f" runs must average at least {point.min_epochs:g}",
        )
    below = points[above - 1]
    return RuleCheck(
        rule,
        True,
        f"compared with the line between the references at batch {below.global_batch_size} ({below.mean_epochs:g}"
        f" epochs) and {point.global_batch_size} ({point.mean_epochs:g})",
    )


_BACKBONE = re.compile(r"backbone\.layer([123])\.(\d+)\.(conv1|conv2|bn1|bn2|downsample\.0|downsample\.1)\.(\w+)")
_STEM = re.compile(r"backbone\.(conv1|bn1)\.(\w+)")
_EXTRA = re.compile(r"extras\.([0-4])\.(conv1|conv2)\.(weight|bias)")
_HEAD = re.compile(r"heads\.([0-5])\.(weight|bias)")


def ssd_tensor_name(parameter: str) -> str:
    """Return the name in weights_initialization of ruleset 1.1 for a parameter of our ssd300-r34.

    The rules use the names of the MXNet implementation, which has one fused head per feature map. It numbers the
    convolutions of a stage in order, the skip convolution after the two of its block. From stage 2, the first block
    has a skip convolution, which shifts the later numbers by one. Raises ValueError for another name.
    """
    if match := _STEM.fullmatch(parameter):
        layer, kind = match.groups()
        return f"ssd0_resnetmlperf0_{_tensor_name(layer, 0, kind)}"
    if match := _BACKBONE.fullmatch(parameter):
        stage, block, layer, kind = match.groups()
        position = 2 if layer.startswith("downsample") else int(layer[-1]) - 1
        shift = 1 if stage != "1" and block != "0" else 0
        return f"ssd0_resnetmlperf0_stage{stage}_{_tensor_name(layer, 2 * int(block) + position + shift, kind)}"
    if match := _EXTRA.fullmatch(parameter):
        index, layer, kind = match.groups()
        return f"ssd0_expand_{'trans_conv' if layer == 'conv1' else 'conv'}{index}_{kind}"
    if match := _HEAD.fullmatch(parameter):
        return f"ssd0_convpredictor{match[1]}_conv0_{match[2]}"
    raise ValueError(f"{parameter} is not a parameter of ssd300-r34: MLPerf has no name for it.")


def _tensor_name(layer: str, index: int, kind: str) -> str:
    if layer in ("bn1", "bn2", "downsample.1"):
        return f"batchnorm{index}_{ {'weight': 'gamma', 'bias': 'beta'}[kind] }"
    return f"conv{index}_{kind}"


def maskrcnn_tensor_names() -> tuple[str, ...]:
    """Return the 21 names in weights_initialization of ruleset 1.1, in the order of the network.

    Each name covers the weight and the bias of one layer. The pretrained backbone has no names.
    """
    blocks = (f"FPN_{kind}_block{number}" for number in range(1, 5) for kind in ("inner", "layer"))
    proposals = (f"RPNHead_{layer}" for layer in ("conv", "cls", "bbox"))
    box = ("FEATURE_EXTRACTOR_fc6", "FEATURE_EXTRACTOR_fc7", "PREDICTOR_cls", "PREDICTOR_bbox")
    mask = (*(f"FEATURE_EXTRACTOR_fcn{number}" for number in range(1, 5)), "PREDICTOR_fcn5", "PREDICTOR_fcn_logits")
    return (*blocks, *proposals, *(f"ROI_BOX_{layer}" for layer in box), *(f"ROI_MASK_{layer}" for layer in mask))


def _require(kind: str, name: str, known: Any) -> None:
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}: choose one of {', '.join(known)}.")
