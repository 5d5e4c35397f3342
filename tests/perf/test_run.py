"""Benchmarks of all parts at a tiny size, their tables and their requirements."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from detection.config.settings import InputError
from detection.runtime.threads import limit_threads
from paths import ROOT
from perf import table
from perf.harness import TINY, Result, bench_size
from perf.machine import RESULTS
from perf.maskrcnn import training
from perf.retinanet import evaluation as retinanet_evaluation
from perf.retinanet import training as retinanet_training
from perf.roofline import count_flop
from perf.run import PARTS, main, parse, select_parts
from perf.table import REQUIREMENTS, check, compare, read
from perf.timing import Quartiles, Variant, interleave, quartiles
from ssd.model import SSD300
from tiny_ssd import TinyBackbone

CPU = torch.device("cpu")
OTHERS = ("maskrcnn", "retinanet")
load_config, load_retinanet_config = training.load_config, retinanet_training.load_config


@pytest.fixture(scope="module")
def measured(tmp_path_factory, small_toy):
    """Results by part, and the file, of a run of all parts."""
    file = tmp_path_factory.mktemp("perf") / "tiny.json"
    argv = ["--out", str(file), "--photos", str(small_toy), "--profile", "--precision", "fp32", "--tiny"]
    with pytest.MonkeyPatch.context() as patch, limit_threads(1):
        patch.setattr("perf.timing.SAMPLE_S", 0.0)  # one call per sample
        patch.setattr("ssd.model.Backbone", TinyBackbone)
        patch.setattr("perf.ssd.baseline.Backbone", TinyBackbone)
        for name in ("training.BOX_REGIONS", "training.MASK_REGIONS", "evaluation.DETECTIONS_PER_IMAGE"):
            patch.setattr(f"perf.maskrcnn.{name}", 4)
        small = ("--backbone", "resnet18", "--box-batch-size-per-image", "16")
        patch.setattr(training, "load_config", lambda context, *flags: load_config(context, *flags, *small))
        tiny = ("--backbone", "resnet18", "--anchor-sizes", "16,32,64,128,256")
        for module in (retinanet_training, retinanet_evaluation):
            patch.setattr(module, "load_config", lambda context, *flags: load_retinanet_config(context, *flags, *tiny))
        patch.setattr(retinanet_training, "NUM_CLASSES", 91)
        assert main(argv) == 0
    by_part = {}
    for result in read(file)["results"]:
        by_part.setdefault(result.part, []).append(result)
    return by_part, file


def test_every_part_is_measured_against_its_baseline(measured):
    by_part, _ = measured
    assert list(by_part) == list(PARTS)
    with_baseline = {"decode", "resize", "jitter", "encode", "input", "forward", "loss", "step", "detect", "metric"}
    for part in with_baseline | {name for name in PARTS if name.startswith(OTHERS)}:
        assert any(result.is_baseline and result.speedup.median > 0 for result in by_part[part])
    for part in ("evaluate", "end-to-end"):
        assert sum(result.is_baseline for result in by_part[part]) >= 2
    for results in by_part.values():
        assert all(0 < r.value.min <= r.value.median <= r.value.max for r in results)


def test_synthetic_and_real_photos_are_measured(measured):
    by_part, _ = measured
    for part in ("decode", "resize", "input"):
        variants = " ".join(result.variant for result in by_part[part])
        assert "synthetic" in variants
        assert "photos" in variants


def test_every_requirement_has_a_result_that_answers_it(measured):
    by_part, _ = measured
    answered = {result.requirement: part for part, results in by_part.items() for result in results}
    for requirement in REQUIREMENTS:
        if requirement.name != "metric":  # which needs 5,000 images
            assert answered[requirement.name] == requirement.part


def test_parts_with_counted_work_have_a_roofline(measured):
    by_part, file = measured
    counted = ["jitter", "encode", "forward", "loss", "step", "end-to-end"]
    counted += ["maskrcnn_step", "maskrcnn_backbone", "maskrcnn_mask_head", "retinanet_step", "retinanet_loss"]
    for part in (
        *counted,
        "maskrcnn_step",
        "maskrcnn_backbone",
        "maskrcnn_mask_head",
        "retinanet_step",
        "retinanet_loss",
    ):
        optimized = next(result for result in by_part[part] if not result.is_baseline)
        is_rate = optimized.unit.endswith("/s")
        assert optimized.bytes > 0
        assert (optimized.roofline > optimized.value.median) == is_rate or optimized.roofline_fraction > 1
    assert all(rates["flop_per_s"] > 0 < rates["bytes_per_s"] for rates in read(file)["rooflines"].values())


def test_profile_writes_traces_and_top_operations(measured):
    _, file = measured
    for name, operations in read(file)["top_ops"].items():
        assert (file.parent / f"tiny_{name}_trace.json.gz").stat().st_size > 1000
        assert 1 < len(operations) <= 10
        assert operations == sorted(operations, key=lambda operation: -operation["ms"])


def test_file_describes_machine_and_settings(measured):
    content = json.loads(measured[1].read_text())
    assert {"hardware", "driver", "versions", "commit", "cores"} <= content["machine"].keys()
    assert content["size"]["photos"] == TINY.photos
    assert content["precision"] == "fp32"
    assert {"load_1min", "other_cpu_percent", "is_idle"} == content["load"].keys()


def test_network_work_matches_a_calculation_by_hand():
    forward = count_flop(SSD300, torch.bfloat16, backward=False, batch_size=2)
    both = count_flop(SSD300, torch.bfloat16, backward=True, batch_size=2)
    assert forward.flop / 1e9 == pytest.approx(31.72, abs=0.01)
    assert both.flop / 1e9 == pytest.approx(94.75, abs=0.01)
    assert 2 * forward.bytes < both.bytes < 4 * forward.bytes
    single = count_flop(SSD300, None, backward=False, batch_size=2)
    assert single.bytes == pytest.approx(2 * forward.bytes, rel=0.02)


def test_variants_are_interleaved_without_their_first_calls(monkeypatch):
    calls = []
    variants = [Variant(name, lambda name=name: calls.append(name), images=2) for name in "ab"]
    monkeypatch.setattr("perf.timing.SAMPLE_S", 0.0)
    samples = interleave(variants, CPU, rounds=3)
    assert "".join(calls) == "ab" + "ababab"
    assert [len(variant_samples) for variant_samples in samples] == [3, 3]


def test_comparison_ends_early_but_not_before_three_rounds(monkeypatch):
    monkeypatch.setattr("perf.timing.SAMPLE_S", 0.0)
    variants = [Variant("", lambda: None)]
    assert len(interleave(variants, CPU, rounds=50, limit_s=0)[0]) == 3
    assert len(interleave(variants, CPU, rounds=2, limit_s=0)[0]) == 2


def test_quartiles_of_one_sample_and_of_several():
    assert quartiles([2.0]) == Quartiles(1, 2, 2, 2, 2, 2)
    assert quartiles([1.0, 2, 3, 4, 5]) == Quartiles(5, 3, 1, 2, 4, 5)


def results_of(**medians):
    """Synthetic results that answer the requirements on a CPU with these numbers."""
    names = {name: name.replace("_", " ").replace("detection ", "detection, ") for name in medians}
    fractions = {requirement.name for requirement in REQUIREMENTS if requirement.of_roofline}
    results = []
    for name, median in medians.items():
        is_fraction = names[name] in fractions
        value = quartiles([1000.0 if is_fraction else median])
        results.append(
            Result("x", name, "×", value, requirement=names[name], roofline_fraction=median if is_fraction else None)
        )
    return results


ENOUGH = {
    "input_of_decoding": 0.6,
    "worker_memory_growth": 1.0,
    "training_step": 0.98,
    "detection_trained_scores": 3.8,
    "detection_early_scores": 9.5,
    "metric": 120.0,
    "end_to_end_of_step": 0.99,
    "maskrcnn_step": 1.1,
    "maskrcnn_evaluation": 3.1,
    "retinanet_step": 2.1,
    "retinanet_loss": 2.1,
    "retinanet_loss_memory": 3.1,
    "retinanet_trained_scores": 3.1,
    "retinanet_early_scores": 3.1,
    "retinanet_evaluation": 5.1,
}


def test_check_passes_if_all_requirements_are_met():
    text, passed = check(results_of(**ENOUGH), on_cpu=True)
    assert passed
    assert text.count("ok") == len(ENOUGH)


@pytest.mark.parametrize("name", ENOUGH)
def test_check_fails_if_one_requirement_is_missed_or_not_measured(name):
    failing = ENOUGH | {name: 1.5 if name == "worker_memory_growth" else 0.8 * ENOUGH[name]}
    text, passed = check(results_of(**failing), on_cpu=True)
    assert not passed
    assert text.count("FAILED") == 1
    text, passed = check(results_of(**{k: v for k, v in ENOUGH.items() if k != name}), on_cpu=True)
    assert not passed
    assert "not measured" in text


def test_requirement_on_a_baseline_applies_to_the_speedup():
    result = Result(
        "step", "baseline", "img/s", quartiles([100.0]), is_baseline=True, speedup=quartiles([2.0, 4.5, 9.0])
    )
    assert table.Requirement("", "step", on_cpu=True, min=4).passed(result)
    assert not table.Requirement("", "step", on_cpu=True, min=5).passed(result)


def test_requirements_on_an_accelerator_apply_to_the_rate_and_to_its_ratio_to_the_step():
    fast = Result("end-to-end", "", "img/s", quartiles([4100.0]), requirement="end to end rate")
    ratio = quartiles([0.98])
    step = Result("end-to-end", "", "img/s", quartiles([4200.0]), True, ratio, requirement="end to end of step")
    assert check([fast, step], on_cpu=False)[1]
    assert not check([replace(fast, value=quartiles([3900.0])), step], on_cpu=False)[1]
    assert not check([fast, replace(step, speedup=quartiles([0.96]))], on_cpu=False)[1]


def test_step_without_a_roofline_fails():
    (result,) = results_of(training_step=0.95)
    requirement = next(requirement for requirement in REQUIREMENTS if requirement.of_roofline)
    assert requirement.passed(result)
    assert not requirement.passed(replace(result, roofline_fraction=None))
    text, _ = check([replace(result, roofline_fraction=None)], on_cpu=True)
    assert "nan of the roofline" in text


def write(path, *results):
    path.write_text(json.dumps({"results": [asdict(result) for result in results]}))
    return path


def test_two_files_are_compared(tmp_path, capsys):
    rate = Result("step", "bf16", "img/s", quartiles([10.0]))
    time = Result("loss", "one sort", "ms/img", quartiles([4.0]))
    only = Result("decode", "gone", "ms/img", quartiles([4.0]))
    first = write(tmp_path / "a.json", rate, time, only)
    second = write(tmp_path / "b.json", replace(rate, value=quartiles([15.0])), replace(time, value=quartiles([8.0])))
    assert main(["--compare", str(first), str(second)]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines["step"].endswith("1.50 ×")
    assert lines["loss"].endswith("0.50 ×")
    assert "gone" not in out
    assert compare([rate], []).count("\n") == 0


def test_records_with_old_keys_are_readable():
    paths = sorted(RESULTS.glob("*_cpu_*.json"))
    results = [result for path in paths for result in read(path)["results"]]
    assert len(paths) >= 4
    assert any(result.is_baseline and result.speedup for result in results)
    assert any(result.roofline_fraction for result in results)
    assert {result.part for result in results} <= set(PARTS)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"results": [{"part": "x"}]}'])
def test_a_file_without_results_is_rejected_by_name(tmp_path, text, capsys):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(InputError, match=r"bad\.json"):
        read(tmp_path / "bad.json")
    assert main(["--compare", str(tmp_path / "bad.json"), str(tmp_path / "absent.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("argv", [[], ["--out", "results/x.json"], ["--allow-dirty", "--out", "perf/results"]])
def test_uncommitted_code_is_not_recorded(argv, monkeypatch, capsys):
    monkeypatch.setattr("perf.machine.source_commit", lambda: "abc1234-dirty")
    monkeypatch.chdir(ROOT)
    assert main(["decode", "--tiny", *argv]) == 2
    assert "results of commit abc1234-dirty are not reproducible" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["stepp"], "Did you mean step?"),
        (["decode", "--photos", "nowhere"], "nowhere"),
        (["decode", "--photos", "ssd"], "--photos ssd: no .jpg file"),
        (["--device", "abacus"], "abacus"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--seed", "-1"], "--seed -1"),
        (["decode", "--out", "README.md/x"], "README.md"),
        (["--precison", "bf16"], "--precison"),
    ],
)
def test_invalid_input_gives_one_message_and_status_2(argv, message, capsys):
    try:
        status = main(["--tiny", *argv])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_list_shows_all_parts(capsys):
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(PARTS)


def test_sizes_match_the_device():
    for quick in (False, True):
        cpu, accelerator = (bench_size(on_cpu=on_cpu, quick=quick) for on_cpu in (True, False))
        assert cpu.batch_size in cpu.batch_sizes
        assert accelerator.epoch_images % accelerator.batch_size == 0
    assert max(bench_size(on_cpu=True).metric_images) == 5000


def test_quick_selects_parts_of_ssd_and_other_workloads_select_theirs():
    def parts(*argv):
        return select_parts(parse(list(argv)), on_cpu=True)

    maskrcnn, retinanet = ([name for name in PARTS if name.startswith(f"{group}_")] for group in OTHERS)
    assert parts("maskrcnn") == maskrcnn
    assert parts("step", "retinanet") == ["step", *retinanet]
    assert parts("--quick") == [name for name in PARTS if name not in maskrcnn + retinanet]
    assert parts() == list(PARTS)
    assert {"step", "maskrcnn_step", "maskrcnn_evaluation", "retinanet_step"} <= set(parts("--quick", "--check"))
