import copy
import json
from typing import Any, Literal, get_args, get_origin

import pytest

from detection.preflight import run_checks
from maskrcnn.commands import PREFLIGHT as MASKRCNN_PREFLIGHT
from mlperf.rules import (
    BENCHMARKS,
    DIVISIONS,
    NOT_IN_LOG,
    RULESETS,
    RuleCheck,
    check_rules,
    declared_settings,
    hyperparameter_keys,
    maskrcnn_tensor_names,
    scheduled_eval_epochs,
    ssd_tensor_name,
)
from recipes_and_checkers import A100, DGX1, RECIPES, checker_yaml, parameters_of_ssd300_r34
from ssd.commands import PREFLIGHT as SSD_PREFLIGHT

# Closed by the rules of 1.1, but for the learning rate of Mask R-CNN on one rank.
CLOSED = {
    "ssd": SSD_PREFLIGHT.load(["--pretrained-backbone", "resnet.pth", "--eval-epochs", "every 5"], {}).config,
    "maskrcnn": MASKRCNN_PREFLIGHT.load(["--pretrained-backbone", "R-50.pkl", "--batch-size", "16"], {}).config,
}
FIELDS = {name: type(config).__pydantic_fields__ for name, config in CLOSED.items()}
SETTINGS = [(benchmark, name) for benchmark, fields in FIELDS.items() for name in fields]


def logged_values(benchmark: str) -> dict[str, Any]:
    """Return the logged values of a published recipe by key."""
    return {key: value for key, value in RECIPES[benchmark].items() if key not in NOT_IN_LOG}


def published_tensor_names(benchmark: str) -> list[str]:
    checks = checker_yaml(f"training_1.1.0/closed_{benchmark}.yaml")
    (end,) = (check["END"]["CHECK"] for check in checks if "END" in check)
    names: list[str] = json.loads(end[end.index("sorted([") + len("sorted(") : end.rindex("]")].rstrip(", \n") + "]")
    return names


def test_maskrcnn_names_match_the_21_of_the_1_1_yaml() -> None:
    assert len(maskrcnn_tensor_names()) == 21
    assert sorted(maskrcnn_tensor_names()) == sorted(published_tensor_names("maskrcnn"))


def test_ssd_names_match_the_119_of_the_1_1_yaml() -> None:
    names = [ssd_tensor_name(parameter) for parameter in parameters_of_ssd300_r34()]
    assert len(names) == 119
    assert sorted(names) == sorted(published_tensor_names("ssd"))


@pytest.mark.parametrize(
    ("parameter", "name"),
    [
        ("backbone.layer1.2.conv2.weight", "ssd0_resnetmlperf0_stage1_conv5_weight"),
        ("backbone.layer2.0.downsample.0.weight", "ssd0_resnetmlperf0_stage2_conv2_weight"),
        ("backbone.layer2.1.conv1.weight", "ssd0_resnetmlperf0_stage2_conv3_weight"),
        ("backbone.layer3.5.bn2.bias", "ssd0_resnetmlperf0_stage3_batchnorm12_beta"),
        ("extras.4.conv1.bias", "ssd0_expand_trans_conv4_bias"),
        ("heads.5.weight", "ssd0_convpredictor5_conv0_weight"),
    ],
)
def test_parameter_has_its_mxnet_name(parameter: str, name: str) -> None:
    assert ssd_tensor_name(parameter) == name


@pytest.mark.parametrize("parameter", ["backbone.layer4.0.conv1.weight", "extras.5.conv1.weight", "fc.weight"])
def test_parameter_of_another_network_is_rejected(parameter: str) -> None:
    with pytest.raises(ValueError, match="not a parameter of ssd300-r34"):
        ssd_tensor_name(parameter)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_hyperparameter_keys_are_those_required_exactly_once(benchmark: str) -> None:
    required = {
        check["KEY"]["NAME"]
        for ruleset in RULESETS
        for file in (f"closed_{benchmark}", "closed_common")
        for check in checker_yaml(f"training_{ruleset}/{file}.yaml")
        if check.get("KEY", {}).get("REQ") == "EXACTLY_ONE"
    }
    assert set(hyperparameter_keys(benchmark)) == required - {"submission_benchmark"}


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@pytest.mark.parametrize("ruleset", RULESETS[1:])
def test_reference_points_match_official_rcp_checker(ruleset: str, benchmark: str) -> None:
    rcp_checker = pytest.importorskip("mlperf_logging.rcp_checker.rcp_checker")
    checker = rcp_checker.RCP_Checker("training", ruleset, benchmark, False)
    official = checker.rcp_data.values()
    points = [point for point in BENCHMARKS[benchmark].reference_points if ruleset in point.rulesets]
    kept = [point.global_batch_size for point in points if not point.pruned]
    assert kept == [point["BS"] for point in checker.pruned_rcp_data.values()]
    assert [point.global_batch_size for point in points] == [point["BS"] for point in official]
    assert [point.mean_epochs for point in points] == pytest.approx([p["RCP Mean"] for p in official], abs=0.05)
    assert [point.min_epochs for point in points] == pytest.approx([p["Min Epochs"] for p in official], abs=0.05)


def test_evaluation_is_at_fixed_epochs_in_0_7_and_every_fifth_from_1_0() -> None:
    assert scheduled_eval_epochs("ssd", "0.7.0", 80) == (40, 50, 55, 60, 65, 70, 75, 80)
    assert scheduled_eval_epochs("ssd", "0.7.0", 54) == (40, 50)
    assert scheduled_eval_epochs("ssd", "1.0.0", 22) == (5, 10, 15, 20)
    assert scheduled_eval_epochs("ssd", "1.1.0", 4) == ()


@pytest.mark.parametrize("ruleset", RULESETS)
def test_published_dgx1_recipe_follows_every_rule(ruleset: str) -> None:
    schedule = scheduled_eval_epochs("ssd", ruleset, 80)
    checks = check_rules("ssd", ruleset, "closed", DGX1 | {"eval_epochs": schedule})
    assert [check for check in checks if not check.passed] == []
    assert {"global_batch_size", "eval_epochs", "dataset", "target"} <= {check.rule for check in checks}


def ssd_violations(ruleset: str, division: str, **changes: object) -> list[str]:
    recipe = DGX1 | {"eval_epochs": scheduled_eval_epochs("ssd", ruleset, 80)} | changes
    return [check.rule for check in check_rules("ssd", ruleset, division, recipe) if not check.passed]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_bn_span", 0),
        ("opt_learning_rate_warmup_steps", 0),
        ("opt_learning_rate_warmup_factor", -1),
        ("opt_learning_rate_decay_boundary_epochs", (44, 56)),
        ("opt_learning_rate_decay_boundary_epochs", (44, 60)),
        ("opt_learning_rate_decay_boundary_epochs", (42, 52.5)),
        ("opt_learning_rate_decay_boundary_epochs", (44,)),
        ("opt_learning_rate_decay_boundary_epochs", (0, 0)),
        ("max_samples", 2),
        ("gradient_accumulation_steps", 0),
        ("target", 0.212),
        ("dataset", "toy"),
        ("network", "ssd300-r50"),
        ("network", "ssd300-r34 on resnet18"),
        ("weights", "trained.pt"),
        ("pretrained_backbone", "none"),
        ("seed", 0),
        ("skip_missing_images", True),
        ("eval_epochs", (40, 50, 55)),
        ("eval_epochs", (10, 20)),
        ("eval_epochs", ()),
        ("opt_weight_decay", None),
    ],
)
def test_closed_run_violates_exactly_one_rule(key: str, value: object) -> None:
    assert ssd_violations("1.1.0", "closed", **{key: value}) == [key]


@pytest.mark.parametrize("epochs", [(40, 50), [44, 55], (48, 60), (60, 75), (80, 100), (36, 45)])
def test_decay_epochs_are_40_and_50_scaled_by_tenths(epochs: object) -> None:
    assert ssd_violations("0.7.0", "closed", opt_learning_rate_decay_boundary_epochs=epochs) == []


def maskrcnn_violations(ruleset: str = "1.1.0", division: str = "closed", **changes: object) -> list[str]:
    recipe = A100 | {"eval_epochs": tuple(range(1, 15))} | changes
    return [check.rule for check in check_rules("maskrcnn", ruleset, division, recipe) if not check.passed]


@pytest.mark.parametrize("ruleset", RULESETS)
@pytest.mark.parametrize(
    ("batch", "lr", "steps"),
    [(96, 0.12, (12000, 16000)), (64, 0.08, (18000, 24000)), (48, 0.06, [24000, 32000]), (16, 0.02, (60000, 80000)),
     (128, 0.16, (9000, 12000)), (256, 0.24, (5625, 7500)), (272, 0.24, (5294, 7058)), (272, 0.24, (5295, 7059))],
)  # fmt: skip
def test_published_maskrcnn_recipes_follow_every_rule(ruleset, batch, lr, steps) -> None:
    changes = {"opt_base_learning_rate": lr, "opt_learning_rate_decay_steps": steps, "global_batch_size": batch}
    assert maskrcnn_violations(ruleset, **changes) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("opt_base_learning_rate", 0.13),
        ("opt_base_learning_rate", 0),
        ("opt_base_learning_rate", 0.0025),
        ("opt_learning_rate_warmup_steps", -1),
        ("opt_learning_rate_warmup_factor", 0),
        ("opt_learning_rate_decay_factor", 0.2),
        ("opt_learning_rate_decay_steps", (12000, 17000)),
        ("opt_learning_rate_decay_steps", (12500, 16667)),
        ("opt_learning_rate_decay_steps", (11999, 16000)),
        ("opt_learning_rate_decay_steps", (12000,)),
        ("opt_learning_rate_decay_steps", (0, 0)),
        ("opt_learning_rate_decay_steps", None),
        ("num_image_candidates", 2000),
        ("num_image_candidates", 0),
        ("min_image_size", 600),
        ("max_image_size", 1344),
        ("gradient_accumulation_steps", 0),
        ("target", 0.37),
        ("mask_target", 0.33),
        ("mask_target", None),
        ("dataset", "toy"),
        ("weights", "trained.pt"),
        ("pretrained_backbone", "none"),
        ("seed", 7),
        ("skip_missing_images", True),
        ("proposals_per_batch", False),
        ("mask_targets", "roi-align"),
        ("rpn_pre_nms_top_n", 1000),
        ("rpn_pre_nms_top_n_eval", 2000),
        ("rpn_post_nms_top_n_eval", 500),
        ("eval_epochs", (5, 10)),
    ],
)
def test_closed_maskrcnn_run_violates_exactly_one_rule(key: str, value: object) -> None:
    assert maskrcnn_violations(**{key: value}) == [key]


def test_maskrcnn_decay_steps_depend_on_global_batch() -> None:
    assert maskrcnn_violations(global_batch_size=100) == ["opt_learning_rate_decay_steps"]


def test_open_maskrcnn_run_is_free_except_targets_in_0_7() -> None:
    free = {"target": 0.1, "mask_target": 0.1, "opt_base_learning_rate": 0.0025, "dataset": "toy"}
    assert maskrcnn_violations("0.7.0", "open", **free) == ["target", "mask_target"]
    assert maskrcnn_violations("1.1.0", "open", **free) == []


def test_every_fifth_epoch_is_wrong_in_0_7() -> None:
    assert ssd_violations("0.7.0", "closed", eval_epochs=(5, 10, 15)) == ["eval_epochs"]
    assert ssd_violations("0.7.0", "closed", eval_epochs=(40, 50)) == []


def test_gradient_accumulation_is_optional_in_0_7() -> None:
    assert ssd_violations("0.7.0", "closed", gradient_accumulation_steps=None) == []


def test_open_ssd_run_is_free_except_target_in_0_7() -> None:
    free = {"dataset": "toy", "max_samples": 7, "eval_epochs": (1, 2), "model_bn_span": None}
    for ruleset in RULESETS:
        assert ssd_violations(ruleset, "open", **free) == []
    assert ssd_violations("0.7.0", "open", target=0.1) == ["target"]
    assert ssd_violations("1.1.0", "open", target=0.1) == []
    assert ssd_violations("1.1.0", "open", target=1.0) == ["target"]


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (16, "batch 1024: 50 epochs"),
        (1024, "batch 1024: 50 epochs"),
        (1200, "batch 1024 (50 epochs) and 1536 (55)"),
        (2048, "batch 1536 (55 epochs) and 4096 (87)"),
        (4096, "batch 4096: 87 epochs, runs must average at least 84.5"),
    ],
)
def test_closed_run_names_its_reference_points(batch: int, text: str) -> None:
    assert text in convergence_check(batch).message
    assert convergence_check(batch).passed


def test_batch_above_all_reference_points_fails() -> None:
    assert not convergence_check(8192).passed


def convergence_check(batch: int) -> RuleCheck:
    checks = check_rules("ssd", "1.1.0", "closed", {"global_batch_size": batch})
    (note,) = (check for check in checks if check.rule == "reference_convergence")
    return note


def preflight_rules(benchmark: str, **changes: object) -> tuple[list[str], list[str]]:
    """Return the notes and violations of preflight for closed settings with changes, which are not validated."""
    config = copy.copy(CLOSED[benchmark])
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    preflight = {"ssd": SSD_PREFLIGHT, "maskrcnn": MASKRCNN_PREFLIGHT}[benchmark]
    return run_checks.check_rules(config, preflight.rule_values(config, 1), 1)


def changed(benchmark: str, name: str) -> object:
    """Return another value of a setting."""
    value, annotation = getattr(CLOSED[benchmark], name), FIELDS[benchmark][name].annotation
    if get_origin(annotation) is Literal:
        return next(choice for choice in get_args(annotation) if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return value[1:]
    return (value or 0) + 1 if isinstance(value, int | float | None) else type(value)("other")


@pytest.mark.parametrize(("benchmark", "name"), SETTINGS)
def test_every_setting_is_declared_once_and_changes_the_closed_division_as_declared(benchmark, name) -> None:
    rules, value = BENCHMARKS[benchmark], changed(benchmark, name)
    assert declared_settings(benchmark).count(name) == 1, "declare it in mlperf/rules.py as free, fixed or constrained"
    unchanged = preflight_rules(benchmark)
    assert unchanged[1] == []
    if name in rules.free:
        selects_the_rules = name in ("ruleset", "division")
        assert selects_the_rules or preflight_rules(benchmark, **{name: value})[1] == []
    elif name in rules.fixed:
        assert rules.fixed[name] == getattr(CLOSED[benchmark], name), "the default in the closed division"
        _, (violation,) = preflight_rules(benchmark, **{name: value})
        assert violation.startswith(f"MLPerf 1.1.0 closed forbids {name}: {value} (allowed: {rules.fixed[name]}")
        notes, violations = preflight_rules(benchmark, **{name: value}, division="open")
        assert [violations, [note for note in notes if "closed would reject" in note]] == [
            [],
            [f"note: closed would reject {name}: {value} (allowed: {rules.fixed[name]}, as in the reference)"],
        ]
    else:
        assert preflight_rules(benchmark, **{name: value}) != unchanged


def test_rules_declare_no_setting_that_does_not_exist() -> None:
    for benchmark, rules in BENCHMARKS.items():
        assert FIELDS[benchmark].keys() >= rules.fixed.keys() | rules.constrained | rules.free


def test_undeclared_setting_is_rejected_in_closed() -> None:
    assert ssd_violations("1.1.0", "closed", label_smoothing=0.0) == ["label_smoothing"]
    assert ssd_violations("1.1.0", "open", label_smoothing=0.0) == []


@pytest.mark.parametrize("names", [("yolo", "1.1.0", "open"), ("ssd", "2.0.0", "open"), ("ssd", "1.1.0", "half")])
def test_unknown_benchmark_ruleset_or_division_is_rejected(names: tuple[str, str, str]) -> None:
    with pytest.raises(ValueError, match=r"unknown .* choose one of"):
        check_rules(*names, {})
    assert DIVISIONS == ("closed", "open")
