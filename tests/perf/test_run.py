"""The bench from end to end on a small scale, and what it says of results."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from detection.config.settings import InputError
from perf import table
from perf.harness import BenchSize, Result, full_size, quick_size
from perf.maskrcnn import training
from perf.roofline import count_flop
from perf.run import PARTS, main, parse, select_parts
from perf.table import REQUIREMENTS, check, compare, read
from perf.timing import Quartiles, Variant, interleave, limit_threads, quartiles
from ssd.model import SSD300
from tiny_ssd import TinyBackbone

CPU = torch.device("cpu")
configured = training.configured
TINY = BenchSize(
    rounds=1,
    limit_s=0,
    warm=False,
    photos=4,
    batch_size=2,
    batch_sizes=(1, 2),
    workers=(0, 1),
    input_images=4,
    predictions=1,
    metric_images=(20,),
    full_metric_rounds=1,
    eval_images=4,
    eval_batch_size=2,
    baseline_eval_images=2,
    epoch_images=2,
    baseline_epoch_images=2,
    maskrcnn_batch_size=1,
    maskrcnn_image_px=(64, 96),
    maskrcnn_eval_images=2,
    read_images=(32, 128),
    data_sizes=(10,),
    compiled=False,
    traced_steps=1,
    matrix_side=64,
    copy_bytes=2**20,
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory, small_toy):
    """What a run of all parts leaves: its results by part, and its file."""
    file = tmp_path_factory.mktemp("perf") / "tiny.json"
    argv = ["--out", str(file), "--photos", str(small_toy), "--profile", "--precision", "fp32"]
    with pytest.MonkeyPatch.context() as patch, limit_threads(1):
        patch.setattr("perf.timing.SAMPLE_S", 0.0)  # one call a sample
        patch.setattr("ssd.model.Backbone", TinyBackbone)
        patch.setattr("perf.ssd.baseline.Backbone", TinyBackbone)
        patch.setattr("perf.ssd.baseline.make_vgg_step", lambda *_: lambda images, targets: images.sum())
        for name in ("maskrcnn.BOX_REGIONS", "maskrcnn.MASK_REGIONS", "maskrcnn_evaluation.DETECTIONS_PER_IMAGE"):
            patch.setattr(f"perf.{name}", 4)
        less = ("--backbone", "resnet18", "--box-batch-size-per-image", "16")
        patch.setattr(training, "configured", lambda bench, *flags: configured(bench, *flags, *less))
        assert main(argv, TINY) == 0
    by_part = {}
    for result in read(file)["results"]:
        by_part.setdefault(result.part, []).append(result)
    return by_part, file


def test_every_part_is_measured_beside_the_plain_way(measured):
    by_part, _ = measured
    assert list(by_part) == list(PARTS)
    plain = {"decode", "resize", "jitter", "encode", "input", "forward", "loss", "step", "detect", "metric"}
    for part in plain | {name for name in PARTS if name.startswith("maskrcnn")}:
        assert any(result.beside and result.times.median > 0 for result in by_part[part])
    for part in ("evaluate", "end-to-end"):
        assert sum(result.beside for result in by_part[part]) >= 2
    for results in by_part.values():
        assert all(0 < r.value.min <= r.value.median <= r.value.max for r in results)


def test_drawn_and_real_photos_are_measured(measured):
    by_part, _ = measured
    for part in ("decode", "resize", "input"):
        variants = " ".join(result.variant for result in by_part[part])
        assert "made up" in variants
        assert "photos" in variants


def test_every_requirement_has_a_result_that_answers_it(measured):
    by_part, _ = measured
    answered = {result.requirement: part for part, results in by_part.items() for result in results}
    for requirement in REQUIREMENTS:
        if requirement.name != "metric":  # which stands on 5,000 images
            assert answered[requirement.name] == requirement.part


def test_limits_are_given_for_what_is_bound_by_them(measured):
    by_part, file = measured
    counted = ("jitter", "encode", "forward", "loss", "step", "end-to-end")
    for part in (*counted, "maskrcnn_step", "maskrcnn_trunk", "maskrcnn_mask_head"):
        ours = next(result for result in by_part[part] if not result.beside)
        better = max if ours.unit.endswith("/s") else min
        assert ours.bytes > 0
        assert better(ours.limit, ours.value.median) == ours.limit or ours.share > 1
    assert all(limits["flop_per_s"] > 0 < limits["bytes_per_s"] for limits in read(file)["limits"].values())


def test_a_profile_leaves_traces_and_the_costliest_operations(measured):
    _, file = measured
    for name, operations in read(file)["costliest"].items():
        assert (file.parent / f"tiny_{name}_trace.json.gz").stat().st_size > 1000
        assert 1 < len(operations) <= 10
        assert operations == sorted(operations, key=lambda operation: -operation["ms"])


def test_the_file_says_what_was_measured_on(measured):
    content = json.loads(measured[1].read_text())
    assert {"hardware", "driver", "versions", "commit", "cores"} <= content["machine"].keys()
    assert content["scale"]["photos"] == TINY.photos
    assert content["precision"] == "fp32"


def test_the_work_of_the_network_is_that_of_the_paper_sums():
    forward = count_flop(SSD300, torch.bfloat16, backward=False, batch_size=2)
    both = count_flop(SSD300, torch.bfloat16, backward=True, batch_size=2)
    assert forward.flop / 1e9 == pytest.approx(31.72, abs=0.01)
    assert both.flop / 1e9 == pytest.approx(94.75, abs=0.01)
    assert 2 * forward.bytes < both.bytes < 4 * forward.bytes
    single = count_flop(SSD300, None, backward=False, batch_size=2)
    assert single.bytes == pytest.approx(2 * forward.bytes, rel=0.02)


def test_sides_take_turns_and_their_first_calls_do_not_count(monkeypatch):
    calls = []
    sides = [Variant(name, lambda name=name: calls.append(name), images=2) for name in "ab"]
    monkeypatch.setattr("perf.timing.SAMPLE_S", 0.0)
    samples = interleave(sides, CPU, rounds=3)
    assert "".join(calls) == "ab" + "ababab"
    assert [len(mine) for mine in samples] == [3, 3]


def test_a_comparison_ends_early_but_not_before_three_rounds(monkeypatch):
    monkeypatch.setattr("perf.timing.SAMPLE_S", 0.0)
    sides = [Variant("", lambda: None)]
    assert len(interleave(sides, CPU, rounds=50, limit_s=0)[0]) == 3
    assert len(interleave(sides, CPU, rounds=2, limit_s=0)[0]) == 2


def test_the_spread_of_one_sample_and_of_more():
    assert quartiles([2.0]) == Quartiles(1, 2, 2, 2, 2, 2)
    assert quartiles([1.0, 2, 3, 4, 5]) == Quartiles(5, 3, 1, 2, 4, 5)


def results_of(**medians):
    """Made-up results that answer the requirements on a CPU with these numbers."""
    return [
        Result(
            "x", name, "×", quartiles([number]), requirement=name.replace("_", " ").replace("detection ", "detection, ")
        )
        for name, number in medians.items()
    ]


ENOUGH = {
    "input_per_core": 4.1,
    "memory_of_a_worker": 1.0,
    "training_step": 4.2,
    "detection_trained_scores": 3.8,
    "detection_early_scores": 9.5,
    "metric": 120.0,
    "end_to_end": 4.0,
    "maskrcnn_step": 1.1,
    "maskrcnn_evaluation": 3.1,
}


def test_a_check_passes_where_all_is_reached():
    text, passed = check(results_of(**ENOUGH), on_cpu=True)
    assert passed
    assert text.count("ok") == len(ENOUGH)


@pytest.mark.parametrize("name", ENOUGH)
def test_a_check_fails_where_one_is_short_or_absent(name):
    short = ENOUGH | {name: 1.5 if name == "memory_of_a_worker" else 0.8 * ENOUGH[name]}
    text, passed = check(results_of(**short), on_cpu=True)
    assert not passed
    assert text.count("SHORT") == 1
    text, passed = check(results_of(**{k: v for k, v in ENOUGH.items() if k != name}), on_cpu=True)
    assert not passed
    assert "not measured" in text


def test_the_ratio_to_the_plain_way_is_what_counts_not_the_rate():
    result = Result("step", "plain", "img/s", quartiles([100.0]), is_baseline=True, speedup=quartiles([2.0, 4.5, 9.0]))
    assert table.Requirement("", "step", on_cpu=True, min=4).passed(result)
    assert not table.Requirement("", "step", on_cpu=True, min=5).passed(result)


def test_an_accelerator_has_to_reach_a_rate():
    fast = Result("end-to-end", "", "img/s", quartiles([4100.0]), requirement="end to end rate")
    assert check([fast], on_cpu=False)[1]
    assert not check([replace(fast, value=quartiles([3900.0]))], on_cpu=False)[1]


def write(path, *results):
    path.write_text(json.dumps({"results": [asdict(result) for result in results]}))
    return path


def test_two_files_are_set_side_by_side(tmp_path, capsys):
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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"results": [{"part": "x"}]}'])
def test_a_file_that_holds_no_results_is_refused_by_name(tmp_path, text, capsys):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(InputError, match=r"bad\.json"):
        read(tmp_path / "bad.json")
    assert main(["--compare", str(tmp_path / "bad.json"), str(tmp_path / "absent.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["stepp"], "did you mean step?"),
        (["decode", "--photos", "nowhere"], "nowhere"),
        (["decode", "--photos", "docs"], "docs"),
        (["--device", "abacus"], "abacus"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--check", "--no-baseline"], "--no-baseline"),
        (["decode", "--out", "README.md/x"], "README.md"),
        (["--precison", "bf16"], "--precison"),
    ],
)
def test_a_mistake_gives_one_message_and_status_2(argv, message, capsys):
    try:
        status = main(argv, TINY)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_list_names_all_parts(capsys):
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(PARTS)


def test_scales_are_for_the_device():
    for scale in (full_size, quick_size):
        assert scale(True).batch_size in scale(True).batch_sizes
        assert scale(False).epoch_images % scale(False).batch_size == 0
    assert max(full_size(True).metric_images) == 5000


def test_quick_is_ssds_parts_and_a_benchmark_can_be_named():
    def parts(*argv):
        return select_parts(parse(list(argv)), on_cpu=True)

    of_maskrcnn = [name for name in PARTS if name.startswith("maskrcnn_")]
    assert parts("maskrcnn") == of_maskrcnn
    assert parts("step", "maskrcnn") == ["step", *of_maskrcnn]
    assert parts("--quick") == [name for name in PARTS if name not in of_maskrcnn]
    assert parts() == list(PARTS)
    assert {"step", "maskrcnn_step", "maskrcnn_evaluation"} <= set(parts("--quick", "--check"))
