"""Score and spread of a result, joint official checks, and the table of the command."""

import json
import logging
from dataclasses import replace

import pytest

from mlperf import check, rcp
from mlperf.check import main
from mlperf.compliance import Verdict
from mlperf.published import PUBLISHED_RESULTS, for_benchmark
from mlperf.rules import BENCHMARKS
from mlperf.score import read_run, score
from paths import shared
from recipes_and_checkers import RULESETS_BY_BENCHMARK
from synthetic_log import write_run


def runs(folder, minutes, **changes):
    folder.mkdir(exist_ok=True)
    each = [
        write_run(folder / f"result_{i}.txt", minutes=length, seed=i, **changes) for i, length in enumerate(minutes)
    ]
    return [read_run(path) for path in each]


def seeds_and_convergence(logs, ruleset="1.1.0", division="closed"):
    return [joint_check.passed for joint_check in rcp.check([run.path for run in logs], ruleset, division)]


@pytest.mark.parametrize(
    ("folder", "minutes", "images_per_s"), [("dgx1_ngc20.06_pytorch", 20.69, 4811), ("nf5488_pytorch", 10.48, 9560)]
)
def test_published_logs_give_published_score_and_speed(folder, minutes, images_per_s):
    logs = [read_run(path) for path in sorted((shared("logs") / folder / "ssd").glob("result_*.txt"))]
    scored = score(logs)
    assert round(scored.seconds / 60, 2) == minutes
    assert sorted(round(run.images_per_s) for run in logs)[2] == images_per_s
    published = [other for other in for_benchmark("ssd") if other.minutes == minutes]
    assert [other.epochs for other in published] == [logs[0].epochs]


def test_score_of_five_runs_drops_fastest_and_slowest_and_spread_includes_them(tmp_path):
    scored = score(runs(tmp_path, [10, 1, 30, 12, 14]))
    assert scored.seconds == 12 * 60
    assert (scored.fastest_s, scored.slowest_s, scored.mean_s) == (60, 1800, pytest.approx(13.4 * 60))
    assert scored.stddev_s == pytest.approx(10.5262 * 60, rel=1e-4)
    half_s = 2.776445 * 10.5262 * 60 / 5**0.5  # t with 4 degrees of freedom, from the tables
    assert scored.interval_s == pytest.approx((13.4 * 60 - half_s, 13.4 * 60 + half_s), abs=0.01)


def test_one_failed_run_is_the_slowest_and_two_leave_no_score(tmp_path):
    good = runs(tmp_path / "good", [10, 11, 12, 13])
    (failed,) = runs(tmp_path / "failed", [1], status="aborted")
    assert score([*good, failed]).seconds == 12 * 60
    scored = score([*good[:3], failed, failed])
    assert scored.seconds is None
    assert "2 of 5 runs did not reach" in scored.why
    assert score([good[0], failed]).seconds is None


def test_log_that_does_not_comply_has_no_time(tmp_path):
    five = runs(tmp_path, [10, 11, 12, 13, 14])
    assert score(five, failed=[five[0].path]).seconds == 13 * 60
    assert score(five, failed=[five[0].path, five[1].path]).seconds is None


def test_fewer_than_five_runs_are_averaged_and_one_has_no_interval(tmp_path):
    three = runs(tmp_path, [10, 11, 15])
    assert score(three).seconds == 12 * 60
    assert "a result has 5" in score(three).why
    assert (score(three[:1]).seconds, score(three[:1]).interval_s) == (600, None)


def test_incomplete_run_has_no_time(tmp_path):
    run = read_run(write_run(tmp_path / "log.txt", without="run_stop"))
    assert (run.seconds, run.reached, run.epochs) == (None, False, 50)
    assert score([run]).seconds is None


def test_run_whose_clock_was_set_back_has_no_time(tmp_path):
    good = runs(tmp_path / "good", [10, 11, 12, 13])
    (back,) = runs(tmp_path / "back", [-30])
    assert back.seconds is None
    assert score([*good, back]).seconds == 12 * 60


def test_published_logs_may_count_batches_and_other_data_sets_have_their_own_size(tmp_path):
    """NVIDIA's logs of RetinaNet have 4,572 training samples, which are steps of 256 images."""
    log = write_run(tmp_path / "log.txt", benchmark="retinanet")
    log.write_text(log.read_text().replace('"value": 117266', '"value": 4572'))
    steps = read_run(log).images_per_s
    log.write_text(log.read_text().replace('"value": 4572', '"value": 1170301'))
    assert read_run(log).images_per_s == steps
    toy = write_run(tmp_path / "toy.txt", benchmark="retinanet", dataset="toy")
    assert read_run(toy).images_per_s == pytest.approx(steps * 117266 / 1170301, rel=1e-3)


def test_log_with_invalid_values_is_not_scored_and_reports_it(tmp_path, capsys):
    log = write_run(tmp_path / "log.txt", global_batch_size="many")  # which the official checker lets pass
    assert main([str(log)]) == 1
    assert f"not scored: {log}: global_batch_size is not a number" in capsys.readouterr().out
    odd = write_run(tmp_path / "odd.txt", dataset="coco2017")
    odd.write_text(odd.read_text().replace('"value": 117266', '"value": "all"'))
    assert read_run(odd).images_per_s is None
    odd.write_text(odd.read_text().replace('"metadata": {', '"metadata": null, "more": {', 1))
    with pytest.raises(ValueError, match="not an MLPerf log line"):
        read_run(odd)


@pytest.mark.parametrize(("benchmark", "ruleset"), RULESETS_BY_BENCHMARK)
def test_official_checkers_accept_runs_that_converge_like_reference(tmp_path, benchmark, ruleset):
    five = runs(tmp_path, [10] * 5, benchmark=benchmark, ruleset=ruleset)
    assert seeds_and_convergence(five, ruleset) == [None, None] if ruleset == "0.7.0" else [True, True]


def test_convergence_is_judged_by_the_points_of_the_ruleset(tmp_path):
    faster = runs(tmp_path, [10] * 5, benchmark="maskrcnn", epochs=13, global_batch_size=48)
    assert seeds_and_convergence(faster, "1.1.0") == [True, False]  # 14 epochs at 48
    assert seeds_and_convergence(faster, "3.1.0") == [True, True]  # on the line from 8 to 128


def test_runs_that_converge_too_fast_are_rejected_and_slightly_faster_ones_are_scaled(tmp_path):
    assert seeds_and_convergence(runs(tmp_path / "a", [10] * 5, epochs=45)) == [True, False]
    faster = runs(tmp_path / "b", [10] * 5, benchmark="maskrcnn", epochs=13, global_batch_size=64)
    _, convergence = rcp.check([run.path for run in faster], "1.1.0", "closed")
    assert convergence.passed
    assert "multiplied by 1.0769" in convergence.text


def test_repeated_seed_is_rejected_and_nothing_is_printed(tmp_path, capfd):
    same = [read_run(write_run(tmp_path / f"result_{i}.txt", seed=7)) for i in range(5)]
    seeds, _ = rcp.check([run.path for run in same], "1.1.0", "closed")
    assert not seeds.passed
    assert "logs seed 7" in seeds.text
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().handlers == [h for h in logging.getLogger().handlers if "ErrorCollector" not in repr(h)]


def test_one_failed_run_converges_and_two_do_not(tmp_path):
    good = runs(tmp_path / "good", [10] * 4)
    failed = runs(tmp_path / "failed", [10] * 6, status="aborted")[4:]
    assert seeds_and_convergence([*good, failed[0]]) == [True, True]
    assert seeds_and_convergence([*good[:3], *failed])[1] is False


def test_joint_checks_do_not_apply_to_0_7_open_division_or_four_runs(tmp_path):
    five = runs(tmp_path, [10] * 5)
    assert seeds_and_convergence(five, "0.7.0") == [None, None]
    assert seeds_and_convergence(five, division="open") == [None, None]
    assert seeds_and_convergence(five[:4]) == [True, None]


def test_crash_of_official_checker_is_reported(tmp_path):
    five = runs(tmp_path, [10] * 5)
    text = five[0].path.read_text()
    five[0].path.write_text(text.replace('"value": "ssd"', '"value": "chess"'))
    seeds, convergence = rcp.check([run.path for run in five], "1.1.0", "closed")
    assert (seeds.passed, convergence.passed) == (True, False)
    assert "crashed" in convergence.text


def test_command_scores_folder_and_writes_json(tmp_path, capsys):
    runs(tmp_path / "runs", [10, 11, 12, 13, 14], config={"ruleset": "1.0.0"})
    assert main([str(tmp_path / "runs"), "--json", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert out.count("PASS") == 7
    assert "score 12.00 minutes" in out
    assert "NVIDIA DGX-1" in out
    (result,) = json.loads((tmp_path / "out.json").read_text())
    assert (result["ruleset"], result["score"]["seconds"]) == ("1.0.0", 720)
    assert [run["seconds"] for run in result["runs"]] == [600, 660, 720, 780, 840]
    assert [verdict["passed"] for verdict in result["verdicts"]] == [True] * 5


def test_copies_of_a_run_count_once_and_are_reported(tmp_path, capsys):
    two = runs(tmp_path / "runs", [10, 20])
    copy = tmp_path / "copy.txt"
    copy.write_text(two[0].path.read_text())
    link = tmp_path / "link.txt"
    link.symlink_to(two[1].path)
    assert main([str(tmp_path / "runs"), str(copy), str(link), str(two[0].path)]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("SAME")] == [
        f"SAME {path} (the run in {first}, which counts once)"
        for path, first in ((copy, two[0].path), (link, two[1].path), (two[0].path, two[0].path))
    ]
    assert ": 2 runs" in out
    assert "score 15.00 minutes" in out


def test_command_without_a_score_exits_with_1(tmp_path, capsys):
    (aborted,) = runs(tmp_path / "aborted", [10], division="open", status="aborted", accuracy=0.1)
    assert main([str(aborted.path)]) == 1  # it complies
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"PASS {aborted.path} (ruleset 1.1.0)",
        "  no score: 1 of 1 runs did not reach the target or do not comply",
    ]
    reached = runs(tmp_path / "reached", [10], division="open")[0].path
    assert main([str(reached)]) == 0
    assert main([str(reached), str(aborted.path)]) == 1


@pytest.mark.parametrize(("images_per_s", "text"), [(4.31, "4.3"), (99.96, "100.0"), (9560.4, "9,560"), (None, "-")])
def test_low_throughput_has_a_decimal_place(tmp_path, images_per_s, text):
    two = [replace(run, images_per_s=images_per_s) for run in runs(tmp_path, [10, 11])]
    lines = check.format_table(check.score_entry([(run, Verdict(True, "0.7.0", [])) for run in two]))
    assert [line.split()[2] for line in lines[2:4]] == [text] * 2


def test_command_fails_runs_that_pass_individually_but_not_jointly(tmp_path, capsys):
    runs(tmp_path / "runs", [10] * 5, epochs=45)
    assert main([str(tmp_path / "runs")]) == 1
    assert "convergence: FAIL" in capsys.readouterr().out


def test_runs_of_two_systems_or_batches_are_two_results(tmp_path, capsys):
    runs(tmp_path / "a", [10, 20])
    runs(tmp_path / "b", [30, 40], global_batch_size=912)
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert ("score 15.00 minutes" in out, "score 35.00 minutes" in out) == (True, True)


def test_runs_on_other_data_are_scored_without_published_results(tmp_path, capsys):
    runs(tmp_path / "runs", [10, 20], dataset="toy", division="open")
    assert main([str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert "ssd on toy, a desk of us" in out
    assert "score 15.00" in out
    assert "DGX-1" not in out


def test_folder_without_logs_and_unwritable_file_exit_with_2(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "contains no result_*.txt" in capsys.readouterr().err
    log = write_run(tmp_path / "log.txt")
    assert main([str(log), "--json", str(tmp_path / "absent" / "out.json")]) == 2
    assert "Name a writable file" in capsys.readouterr().err


def test_every_published_result_has_a_known_benchmark_and_a_source():
    assert {other.benchmark for other in PUBLISHED_RESULTS} == set(BENCHMARKS)
    assert all(other.source for other in PUBLISHED_RESULTS)
