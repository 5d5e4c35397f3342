import copy
import re
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

import commands
from detection.preflight import run_checks
from maskrcnn.commands import PREFLIGHT as MASKRCNN_PREFLIGHT
from mlperf import score
from mlperf.rules import (
    BENCHMARKS,
    DIVISIONS,
    RuleCheck,
    check_rules,
    declared_settings,
    hyperparameter_keys,
    identify_benchmark,
    mlperf_name,
    newest_ruleset,
    reference_points_of,
    scheduled_eval_epochs,
    targets,
    tensor_names,
)
from recipes_and_checkers import A100, DGX1, RECIPES, RULESETS_BY_BENCHMARK, checker_yaml, parameters_of_ssd300_r34
from retinanet.commands import PREFLIGHT as RETINANET_PREFLIGHT
from ssd.commands import PREFLIGHT as SSD_PREFLIGHT
from ssd.model import make_model

# Closed by the rules of the newest ruleset.
CLOSED = {
    "ssd": SSD_PREFLIGHT.load(["--pretrained-backbone", "resnet.pth", "--eval-epochs", "every 5"], {}).config,
    "maskrcnn": MASKRCNN_PREFLIGHT.load(["--pretrained-backbone", "R-50.pkl", "--batch-size", "16"], {}).config,
    "retinanet": RETINANET_PREFLIGHT.load(["--pretrained-backbone", "resnext50.pth"], {}).config,
}
FIELDS = {name: type(config).__pydantic_fields__ for name, config in CLOSED.items()}
SETTINGS = [(benchmark, name) for benchmark, fields in FIELDS.items() for name in fields]


def closed_values(benchmark: str, ruleset: str) -> dict[str, Any]:
    """Return the values of a published recipe that follows every rule."""
    return RECIPES[benchmark] | {"eval_epochs": scheduled_eval_epochs(benchmark, ruleset, 80)}


def broken_rules(benchmark: str, ruleset: str, division: str, values: dict[str, Any]) -> set[str]:
    return {check.rule for check in check_rules(benchmark, ruleset, division, values) if not check.passed}


def test_names_in_the_log_depend_on_the_ruleset() -> None:
    assert [mlperf_name("retinanet", ruleset) for ruleset in ("2.0.0", "4.1.0", "5.0.0")] == ["ssd", "ssd", "retinanet"]
    assert {mlperf_name("ssd", ruleset) for ruleset in BENCHMARKS["ssd"].names} == {"ssd"}
    assert [newest_ruleset(benchmark) for benchmark in BENCHMARKS] == ["1.1.0", "3.1.0", "5.1.0"]
    assert newest_ruleset("retinanet", "ssd") == "4.1.0"
    assert mlperf_name("dummy", "1.1.0") == "dummy"


@pytest.mark.parametrize(("benchmark", "ruleset"), RULESETS_BY_BENCHMARK)
def test_official_package_has_every_benchmark_of_a_ruleset_by_its_name(benchmark: str, ruleset: str) -> None:
    from mlperf_logging import benchmark_meta

    name = mlperf_name(benchmark, ruleset)
    assert name in benchmark_meta.get_allowed_benchmarks("training", ruleset)
    assert benchmark_meta.get_result_file_counts("training")[name] == score.RUNS_PER_RESULT
    assert identify_benchmark(name, ruleset) == benchmark
    unnamed = "retinanet" if benchmark == "retinanet" else benchmark
    assert identify_benchmark(name, "", RECIPES[benchmark].keys()) == unnamed


def test_log_of_another_benchmark_is_not_identified() -> None:
    assert (
        identify_benchmark("bert")
        == identify_benchmark("ssd", "5.0.0")
        == identify_benchmark("maskrcnn", "4.0.0")
        == ""
    )


def test_tensor_names_are_read_from_the_newest_ruleset_that_requires_them() -> None:
    assert [len(tensor_names(benchmark)) for benchmark in BENCHMARKS] == [119, 21, 89]
    assert tensor_names("maskrcnn")[8:13] == [
        "RPNHead_conv", "RPNHead_cls", "RPNHead_bbox", "ROI_BOX_FEATURE_EXTRACTOR_fc6", "ROI_BOX_FEATURE_EXTRACTOR_fc7",
    ]  # fmt: skip
    assert tensor_names("retinanet")[0] == "module.backbone.body.conv1.weight"


def test_tensor_names_are_in_the_order_of_the_networks_parameters() -> None:
    names = dict(zip(parameters_of_ssd300_r34(), tensor_names("ssd"), strict=True))
    assert {
        "backbone.layer1.2.conv2.weight": "ssd0_resnetmlperf0_stage1_conv5_weight",
        "backbone.layer2.0.downsample.0.weight": "ssd0_resnetmlperf0_stage2_conv2_weight",
        "backbone.layer2.1.conv1.weight": "ssd0_resnetmlperf0_stage2_conv3_weight",
        "backbone.layer3.5.bn2.bias": "ssd0_resnetmlperf0_stage3_batchnorm12_beta",
        "extras.4.conv1.bias": "ssd0_expand_trans_conv4_bias",
        "heads.5.weight": "ssd0_convpredictor5_conv0_weight",
    }.items() <= names.items()
    with torch.device("meta"):
        model = make_model(SSD_PREFLIGHT.load([], {}).config)
    assert [name for name, _ in model.named_parameters()] == list(names)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_hyperparameter_keys_are_those_required_exactly_once(benchmark: str) -> None:
    required = {
        check["KEY"]["NAME"]
        for ruleset, name in BENCHMARKS[benchmark].names.items()
        for file in (f"closed_{name}", "closed_common")
        for check in checker_yaml(f"training_{ruleset}/{file}.yaml")
        if check.get("KEY", {}).get("REQ") == "EXACTLY_ONE"
    }
    assert set(hyperparameter_keys(benchmark)) == required - {"submission_benchmark"}


def test_targets_are_those_of_the_checker() -> None:
    assert [targets(benchmark) for benchmark in BENCHMARKS] == [
        {"AP": 0.23},
        {"AP": 0.377, "mask_AP": 0.339},
        {"AP": 0.34},
    ]


@pytest.mark.parametrize(
    ("benchmark", "ruleset", "kept", "pruned"),
    [
        ("ssd", "0.7.0", {}, []),
        ("ssd", "1.0.0", {1024: 50, 4096: 87}, [2048]),
        ("ssd", "1.1.0", {1024: 50, 1536: 55, 4096: 87}, [2048]),
        ("maskrcnn", "1.1.0", {48: 14, 64: 14, 128: 14, 272: 17.125}, [96, 256]),
        ("maskrcnn", "3.1.0", {8: 12.75, 128: 14, 272: 17.125}, [48, 64, 96, 256]),
        ("retinanet", "2.0.0", {256: 4, 4096: 15.154}, [512]),
        ("retinanet", "5.1.0", {256: 4, 320: 4.111, 768: 5, 2560: 8.636, 4096: 15.154}, [512, 1024, 1280, 2048]),
    ],
)
def test_reference_points_are_those_of_the_reference(benchmark, ruleset, kept, pruned) -> None:
    points = reference_points_of(benchmark, ruleset)
    epochs = {point.global_batch_size: point.mean_epochs for point in points if not point.pruned}
    assert epochs == pytest.approx(kept, abs=1e-3)
    assert [point.global_batch_size for point in points if point.pruned] == pruned
    assert all(point.min_epochs <= point.mean_epochs for point in points)


INVALID_VALUES = (
    *(-1, 0, 2.5, 1500.5, 0.013, 1e9, (1,), (44, 56)),
    *({"BBOX": 0.1, "SEGM": 0.9}, {"BBOX": 1.0, "SEGM": 0.9}, {"BBOX": 0.9, "SEGM": 0.3}),
)


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize(("benchmark", "ruleset"), RULESETS_BY_BENCHMARK)
def test_recipe_passes_and_every_test_of_the_checkers_files_is_enforced(benchmark, ruleset, division) -> None:
    """Evaluate the tests of the yaml files here, without the checker, to find values that it rejects."""
    values = closed_values(benchmark, ruleset)
    assert broken_rules(benchmark, ruleset, division, values) == set()
    files = (f"{division}_common", f"{division}_{mlperf_name(benchmark, ruleset)}")
    records = [
        check["KEY"] for file in files for check in checker_yaml(f"training_{ruleset}/{file}.yaml") if "KEY" in check
    ]
    context = {"is_integer": lambda number: abs(round(number) - number) < 1e-5, "s": {"global_batch_size": 256}}

    def allows(test: str, value: object) -> bool:
        try:
            return bool(eval(test.strip(), context, {"v": {"value": value, "metadata": {"epoch_num": 1}}}))
        except (TypeError, KeyError, IndexError):
            return True  # a value of another type

    for record in records:
        key = record["NAME"]
        if key in ("submission_benchmark", "weights_initialization"):
            continue
        rule = "target" if key == "eval_accuracy" else key
        assert rule in broken_rules(benchmark, ruleset, division, values | {key: None})
        if test := record.get("ATLEAST_ONE_CHECK") or record.get("CHECK"):
            invalid = [value for value in INVALID_VALUES if not allows(test, value)]
            assert invalid, test
            for value in invalid:
                assert rule in broken_rules(benchmark, ruleset, division, values | {key: value}), (key, value)


def test_learning_rate_below_batch_16_may_be_a_fraction_from_2_0() -> None:
    steps = {"opt_learning_rate_decay_steps": (120_000, 160_000), "batch_size": 8, "num_image_candidates": 8000}
    small = closed_values("maskrcnn", "2.0.0") | steps | {"global_batch_size": 8, "opt_base_learning_rate": 0.01}
    assert broken_rules("maskrcnn", "2.0.0", "closed", small) == set()
    assert broken_rules("maskrcnn", "1.1.0", "closed", small) == {"opt_base_learning_rate"}
    large = closed_values("maskrcnn", "2.0.0") | {"opt_base_learning_rate": 0.01}
    assert broken_rules("maskrcnn", "2.0.0", "closed", large) == {"opt_base_learning_rate"}


def test_evaluation_is_at_fixed_epochs_in_0_7_and_every_fifth_from_1_0() -> None:
    assert scheduled_eval_epochs("ssd", "0.7.0", 80) == (40, 50, 55, 60, 65, 70, 75, 80)
    assert scheduled_eval_epochs("ssd", "0.7.0", 54) == (40, 50)
    assert scheduled_eval_epochs("ssd", "1.0.0", 22) == (5, 10, 15, 20)
    assert scheduled_eval_epochs("ssd", "1.1.0", 4) == ()


@pytest.mark.parametrize("ruleset", BENCHMARKS["ssd"].names)
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


@pytest.mark.parametrize("ruleset", BENCHMARKS["maskrcnn"].names)
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


def test_maskrcnn_needs_both_targets() -> None:
    for low in ({"BBOX": 0.37, "SEGM": 0.339}, {"BBOX": 0.377, "SEGM": 0.33}, None):
        assert maskrcnn_violations(eval_accuracy=low) == ["target"]


def test_open_maskrcnn_run_is_free_except_targets_in_0_7() -> None:
    free = {"eval_accuracy": {"BBOX": 0.1, "SEGM": 0.1}, "opt_base_learning_rate": 0.0025, "dataset": "toy"}
    assert maskrcnn_violations("0.7.0", "open", **free) == ["target"]
    assert maskrcnn_violations("1.1.0", "open", **free) == []


def test_every_fifth_epoch_is_wrong_in_0_7() -> None:
    assert ssd_violations("0.7.0", "closed", eval_epochs=(5, 10, 15)) == ["eval_epochs"]
    assert ssd_violations("0.7.0", "closed", eval_epochs=(40, 50)) == []


def test_gradient_accumulation_is_optional_in_0_7() -> None:
    assert ssd_violations("0.7.0", "closed", gradient_accumulation_steps=None) == []


def test_open_ssd_run_is_free_except_target_in_0_7() -> None:
    free = {"dataset": "toy", "max_samples": 7, "eval_epochs": (1, 2), "model_bn_span": None}
    for ruleset in BENCHMARKS["ssd"].names:
        assert ssd_violations(ruleset, "open", **free) == []
    assert ssd_violations("0.7.0", "open", eval_accuracy=0.1) == ["target"]
    assert ssd_violations("1.1.0", "open", eval_accuracy=0.1) == []
    assert ssd_violations("1.1.0", "open", eval_accuracy=1.0) == ["target"]
    assert ssd_violations("1.1.0", "closed", eval_accuracy=0.212) == ["target"]


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


def test_reference_points_apply_to_the_benchmarks_own_data_only() -> None:
    for values in ({"dataset": "toy", "global_batch_size": 8192}, {"dataset": "coco2017"}):
        assert "reference_convergence" not in {check.rule for check in check_rules("ssd", "1.1.0", "closed", values)}
    (note,) = (
        check
        for check in check_rules("ssd", "0.7.0", "closed", {"dataset": "coco2017", "global_batch_size": 8192})
        if check.rule == "reference_convergence"
    )
    assert (note.passed, note.message) == (True, "ruleset 0.7.0 has no reference points")


def convergence_check(batch: int) -> RuleCheck:
    checks = check_rules("ssd", "1.1.0", "closed", {"global_batch_size": batch, "dataset": "coco2017"})
    (note,) = (check for check in checks if check.rule == "reference_convergence")
    return note


def preflight_rules(benchmark: str, **changes: object) -> tuple[list[str], list[str]]:
    """Return the notes and violations of preflight for closed settings with changes, which are not validated."""
    config = copy.copy(CLOSED[benchmark])
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    preflight = {"ssd": SSD_PREFLIGHT, "maskrcnn": MASKRCNN_PREFLIGHT, "retinanet": RETINANET_PREFLIGHT}[benchmark]
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
        ruleset = CLOSED[benchmark].ruleset
        assert violation.startswith(f"MLPerf {ruleset} closed forbids {name}: {value} (allowed: {rules.fixed[name]}")
        notes, violations = preflight_rules(benchmark, **{name: value}, division="open")
        assert [violations, [note for note in notes if "closed would reject" in note]] == [
            [],
            [f"note: closed would reject {name}: {value} (allowed: {rules.fixed[name]}, as in the reference)"],
        ]
    else:
        assert preflight_rules(benchmark, **{name: value}) != unchanged


def test_rules_declare_no_setting_that_does_not_exist() -> None:
    for benchmark, fields in FIELDS.items():
        rules = BENCHMARKS[benchmark]
        assert fields.keys() >= rules.fixed.keys() | rules.constrained | rules.free


def test_undeclared_setting_is_rejected_in_closed() -> None:
    assert ssd_violations("1.1.0", "closed", label_smoothing=0.0) == ["label_smoothing"]
    assert ssd_violations("1.1.0", "open", label_smoothing=0.0) == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("yolo", "1.1.0", "open"), "yolo, open: unknown"),
        (("ssd", "2.0.0", "open"), "has no SSD300. Choose one of 0.7.0, 1.0.0, 1.1.0."),
        (("maskrcnn", "6.0.0", "open"), "unknown ruleset. Choose one of 0.7.0, 1.0.0,"),
        (("ssd", "1.1.0", "half"), "ssd, half: unknown"),
    ],
)
def test_unknown_benchmark_ruleset_or_division_is_rejected(names: tuple[str, str, str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_rules(*names, {})


@pytest.mark.parametrize(
    ("command", "ruleset", "title"),
    [
        (commands.ssd, "2.0.0", "SSD300"),
        (commands.maskrcnn, "4.0.0", "Mask R-CNN"),
        (commands.retinanet, "1.1.0", "RetinaNet"),
    ],
)
def test_ruleset_without_the_benchmark_is_one_message_of_preflight(command, ruleset, title, capsys) -> None:
    assert command("preflight", "--dry-run", "--ruleset", ruleset) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: --ruleset={ruleset}: has no {title}. Choose one of ")


def test_default_ruleset_is_the_newest_of_the_benchmark() -> None:
    assert {benchmark: config.ruleset for benchmark, config in CLOSED.items()} == {
        benchmark: newest_ruleset(benchmark) for benchmark in CLOSED
    }
