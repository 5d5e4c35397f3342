"""The MLPerf training rules that bind a run before it starts: schedule, target and hyperparameters, as data.

Sources: the rules table of mlcommons/training_policies and the yaml files of mlperf_logging's compliance
checker. Where the two differ, the stricter one is taken, so that what passes here passes both.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

RULESETS = ("0.7.0", "1.0.0", "1.1.0")
DIVISIONS = ("closed", "open")
STATUSES = ("cloud", "onprem", "preview", "research")

_SINCE_1_0 = RULESETS[1:]


@dataclass(frozen=True)
class Constraint:
    """What the rules allow for one value.

    key: the MLPerf key, or one of `UNLOGGED`. allowed: the same in words, for a message.
    rulesets, divisions: where it binds.
    """

    key: str
    allowed: str
    holds: Callable[[Any], bool]
    rulesets: tuple[str, ...] = RULESETS
    divisions: tuple[str, ...] = ("closed",)


@dataclass(frozen=True)
class ReferencePoint:
    """How fast the reference converges, as mlperf_logging's rcp_checker computes it from its runs.

    global_batch_size: images a step. mean_epochs: to the target, without the fastest and the slowest run.
    min_epochs: the fewest that the mean of a submission may have.
    """

    global_batch_size: int
    mean_epochs: float
    min_epochs: float
    rulesets: tuple[str, ...] = _SINCE_1_0


@dataclass(frozen=True)
class Rules:
    """The rules of one benchmark.

    targets: metric to the least value that ends a run. fixed_eval_epochs: ruleset to the epochs after which
    it evaluates; in the other rulesets it does so every `eval_every` epochs.
    """

    targets: Mapping[str, float]
    eval_every: int
    fixed_eval_epochs: Mapping[str, tuple[int, ...]]
    constraints: tuple[Constraint, ...]
    reference_points: tuple[ReferencePoint, ...]


@dataclass(frozen=True)
class Finding:
    """What the rules say about one value: rule is its key, ok whether it may be so, text why."""

    rule: str
    ok: bool
    text: str


# What `judge` needs beside the keys of a log.
UNLOGGED = ("dataset", "network", "checkpoint", "target", "eval_epochs")

_SSD_TARGET = 0.23


def _is_decay_of_40_50(epochs: Any) -> bool:
    # The checker's yaml has the key CHECK twice, so it tests the second epoch only; the rule has one k.
    if len(epochs) != 2 or min(epochs) <= 0:
        return False
    tenths = [10 * epochs[0] / 40, 10 * epochs[1] / 50]
    return all(abs(tenth - round(tenths[0])) < 1e-5 for tenth in tenths)


SSD = Rules(
    targets={"bbox": _SSD_TARGET},
    eval_every=5,
    fixed_eval_epochs={"0.7.0": (40, 50, 55, 60, 65, 70, 75, 80)},
    constraints=(
        Constraint("global_batch_size", "≥ 1 image", lambda size: size >= 1),
        Constraint("model_bn_span", "≥ 1 image", lambda images: images >= 1),
        # Published logs have multiples of 2.5e-3: their submitters' rounding, asked for by no rule.
        Constraint("opt_base_learning_rate", "> 0, after warm-up and before decay", lambda rate: rate > 0),
        Constraint("opt_weight_decay", "≥ 0", lambda decay: decay >= 0),
        Constraint("opt_learning_rate_warmup_steps", "≥ 1", lambda steps: steps >= 1),
        Constraint("opt_learning_rate_warmup_factor", "≥ 0", lambda factor: factor >= 0),
        Constraint("opt_learning_rate_decay_boundary_epochs", "[40, 50]·(1 + k/10), k an integer", _is_decay_of_40_50),
        Constraint("max_samples", "1 or 50", lambda samples: samples in (1, 50)),
        Constraint("gradient_accumulation_steps", "≥ 1", lambda steps: steps >= 1, rulesets=_SINCE_1_0),
        Constraint("dataset", "coco2017", lambda name: name == "coco2017"),
        Constraint("network", "ssd300-r34", lambda name: name == "ssd300-r34"),
        Constraint("checkpoint", "none: the trunk alone may be trained before", lambda name: name == "none"),
        Constraint("target", "≥ 0.23 and < 1", lambda target: _SSD_TARGET <= target < 1),
        Constraint(
            "target",
            "≥ 0.23 and < 1",
            lambda target: _SSD_TARGET <= target < 1,
            rulesets=("0.7.0",),
            divisions=("open",),
        ),
        Constraint("target", "< 1", lambda target: target < 1, rulesets=_SINCE_1_0, divisions=("open",)),
    ),
    reference_points=(
        ReferencePoint(1024, 50, 50),
        ReferencePoint(1536, 55, 55, rulesets=("1.1.0",)),
        ReferencePoint(2048, 65.1, 64.2),
        ReferencePoint(4096, 87, 84.5),
    ),
)

BENCHMARKS: Mapping[str, Rules] = {"ssd": SSD}


def init_limit_s(ruleset: str) -> int:
    """Return the seconds that may pass between init_start and init_stop."""
    _require("ruleset", ruleset, RULESETS)
    return 20 * 60 if ruleset == "0.7.0" else 30 * 60


def scheduled_eval_epochs(benchmark: str, ruleset: str, last_epoch: int) -> tuple[int, ...]:
    """Return the epochs, from 1 and up to last_epoch, after which the ruleset has the benchmark evaluate."""
    _require("benchmark", benchmark, BENCHMARKS)
    _require("ruleset", ruleset, RULESETS)
    rules = BENCHMARKS[benchmark]
    every = range(rules.eval_every, last_epoch + 1, rules.eval_every)
    return tuple(epoch for epoch in rules.fixed_eval_epochs.get(ruleset, every) if epoch <= last_epoch)


def hyperparameter_keys(benchmark: str) -> tuple[str, ...]:
    """Return the keys that a run logs exactly once each.

    They are those of all rulesets: a key that a ruleset does not know is allowed, so a run can log them all.
    """
    _require("benchmark", benchmark, BENCHMARKS)
    keys = (constraint.key for constraint in BENCHMARKS[benchmark].constraints)
    return tuple(dict.fromkeys(key for key in keys if key not in UNLOGGED))


def judge(benchmark: str, ruleset: str, division: str, hyperparameters: Mapping[str, object]) -> list[Finding]:
    """Say what the rules say about a run before it starts.

    hyperparameters: the values under the keys that the log will have, and `target` (mAP), `eval_epochs`
    (a sequence) and `dataset` ("coco2017" or another name). A value that is absent or None does not pass.
    Raises ValueError for an unknown benchmark, ruleset or division.
    """
    _require("benchmark", benchmark, BENCHMARKS)
    _require("ruleset", ruleset, RULESETS)
    _require("division", division, DIVISIONS)
    rules = BENCHMARKS[benchmark]

    findings = []
    for constraint in rules.constraints:
        if ruleset in constraint.rulesets and division in constraint.divisions:
            value = hyperparameters.get(constraint.key)
            text = "not given" if value is None else f"{value}"
            ok = value is not None and constraint.holds(value)
            findings.append(Finding(constraint.key, ok, f"{text} (allowed: {constraint.allowed})"))
    if division == "open":
        findings.append(Finding("dataset", True, f"{hyperparameters.get('dataset')} (any, in the open division)"))
        return findings

    findings.append(_judge_eval_epochs(benchmark, ruleset, hyperparameters.get("eval_epochs")))
    points = [point for point in rules.reference_points if ruleset in point.rulesets]
    batch = hyperparameters.get("global_batch_size")
    if points and isinstance(batch, int):
        findings.append(_judge_convergence(points, batch))
    return findings


def _judge_eval_epochs(benchmark: str, ruleset: str, eval_epochs: Any) -> Finding:
    epochs = tuple(eval_epochs or ())
    schedule = scheduled_eval_epochs(benchmark, ruleset, last_epoch=max(epochs, default=0))
    if epochs and epochs == schedule:
        return Finding("eval_epochs", True, f"{epochs}, as scheduled in {ruleset}")
    rules = BENCHMARKS[benchmark]
    fixed = rules.fixed_eval_epochs.get(ruleset)
    allowed = f"after epochs {fixed}" if fixed else f"every {rules.eval_every} epochs"
    return Finding("eval_epochs", False, f"{epochs or 'not given'} (allowed: {allowed})")


def _judge_convergence(points: list[ReferencePoint], batch: int) -> Finding:
    """Name the reference points that rcp_checker will hold a submission of this global batch to."""
    rule = "reference_convergence"
    above = next((index for index, point in enumerate(points) if point.global_batch_size >= batch), None)
    if above is None:
        largest = points[-1].global_batch_size
        return Finding(rule, False, f"no reference point at or above batch {batch}, the largest is at {largest}")
    point = points[above]
    if above == 0 or point.global_batch_size == batch:
        return Finding(
            rule,
            True,
            f"held to the reference at batch {point.global_batch_size}: {point.mean_epochs:g} epochs,"
            f" runs must average at least {point.min_epochs:g}",
        )
    below = points[above - 1]
    return Finding(
        rule,
        True,
        f"held to the line between the references at batch {below.global_batch_size} ({below.mean_epochs:g}"
        f" epochs) and {point.global_batch_size} ({point.mean_epochs:g})",
    )


_BACKBONE = re.compile(r"backbone\.layer([123])\.(\d+)\.(conv1|conv2|bn1|bn2|downsample\.0|downsample\.1)\.(\w+)")
_STEM = re.compile(r"backbone\.(conv1|bn1)\.(\w+)")
_EXTRA = re.compile(r"extras\.([0-4])\.(conv1|conv2)\.(weight|bias)")
_HEAD = re.compile(r"heads\.([0-5])\.(weight|bias)")


def ssd_tensor_name(parameter: str) -> str:
    """Return the name under which weights_initialization of ruleset 1.1 knows a parameter of our ssd300-r34.

    The rules use the names of the MXNet implementation, which has one fused head per feature map. It counts
    the convolutions of a stage in order, that of the skip after the two of its block: from stage 2 on the
    first block has one, which moves the later ones up. Raises ValueError for another name.
    """
    if match := _STEM.fullmatch(parameter):
        layer, kind = match.groups()
        return f"ssd0_resnetmlperf0_{_tensor(layer, 0, kind)}"
    if match := _BACKBONE.fullmatch(parameter):
        stage, block, layer, kind = match.groups()
        position = 2 if layer.startswith("downsample") else int(layer[-1]) - 1
        shift = 1 if stage != "1" and block != "0" else 0
        return f"ssd0_resnetmlperf0_stage{stage}_{_tensor(layer, 2 * int(block) + position + shift, kind)}"
    if match := _EXTRA.fullmatch(parameter):
        index, layer, kind = match.groups()
        return f"ssd0_expand_{'trans_conv' if layer == 'conv1' else 'conv'}{index}_{kind}"
    if match := _HEAD.fullmatch(parameter):
        return f"ssd0_convpredictor{match[1]}_conv0_{match[2]}"
    raise ValueError(f"{parameter} is not a parameter of ssd300-r34, so MLPerf has no name for it.")


def _tensor(layer: str, index: int, kind: str) -> str:
    if layer in ("bn1", "bn2", "downsample.1"):
        return f"batchnorm{index}_{ {'weight': 'gamma', 'bias': 'beta'}[kind] }"
    return f"conv{index}_{kind}"


def _require(what: str, name: str, known: Any) -> None:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}: choose one of {', '.join(known)}.")
