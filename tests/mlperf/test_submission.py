"""From five runs to a folder that the official checkers accept, and one message per mistake."""

import contextlib
import glob
import io
import json
import logging
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest

from git_repository import git
from mlperf import check, compliance, submission, system_desc
from mlperf.compliance import Verdict
from mlperf.rules import mlperf_name
from mlperf.submission import REQUIRED_FILES, main, make_parser, run_official_checkers
from paths import ROOT
from recipes_and_checkers import RECIPES, RULESETS_BY_BENCHMARK
from ssd.config import load
from synthetic_log import write_run

MANUAL_FIELDS = ("--set", "host_memory_configuration=2 × 12 GiB", "--set", "cooling=air")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Repository whose only commit has the files that an implementation needs."""
    root = tmp_path_factory.mktemp("program")
    for name in (*REQUIRED_FILES, "train.py"):
        (root / name).write_text(f"# {name}\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "All")
    return root


@pytest.fixture
def official_checkers_in_process(monkeypatch):
    """Run the programs of the official checkers in this process, which saves their start."""
    root = logging.getLogger()

    def run_checker(name, *arguments):
        output, handlers = io.StringIO(), root.handlers[:]
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--log_output", "/dev/null"])
        root.handlers.clear()
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(None):
            runpy.run_module(f"mlperf_logging.{name}", run_name="__main__")
        root.handlers[:] = handlers
        return subprocess.CompletedProcess([name], 0, "", output.getvalue())

    monkeypatch.setattr(submission, "_run_checker", run_checker)


@pytest.fixture
def system(monkeypatch, official_checkers_in_process):
    """Machine that reports everything except cooling and memory configuration."""
    fields = dict.fromkeys(system_desc.FIELDS[4:], "some") | dict.fromkeys(("host_memory_configuration", "cooling"))
    monkeypatch.setattr(system_desc, "system_description", lambda nodes: fields | {"number_of_nodes": str(nodes)})


@pytest.fixture
def compliant(monkeypatch):
    """Skip the compliance checker, which is slow and tested elsewhere."""
    monkeypatch.setattr(compliance, "check", lambda path, ruleset: Verdict(True, ruleset, []))


def write_runs(folder, repository, benchmark="ssd", number=5, **changes):
    folder.mkdir()
    commit = {"value": git(repository, "rev-parse", "HEAD"), "dirty": False}
    values = {"platform": "1xDESK", "commit": commit, "benchmark": benchmark, "ruleset": "1.1.0"} | changes
    config = {"ruleset": values["ruleset"], "system": "DESK", "precision": "bf16"}
    for i in range(number):
        settings = config | {"run_index": i}
        write_run(folder / f"result_{i}.txt", **{"seed": i, "config": settings} | values)
    return folder


def submit(tmp_path, repository, *arguments):
    common = ("--org", "us", "--system", "DESK", "--out", str(tmp_path / "out"), "--repository", str(repository))
    return main([*common, *MANUAL_FIELDS, *map(str, arguments)])


def read_error(capsys):
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(("benchmark", "ruleset"), RULESETS_BY_BENCHMARK)
@pytest.mark.usefixtures("system")
def test_official_checkers_accept_folder_of_five_runs(tmp_path, repository, capsys, benchmark, ruleset):
    runs, name = write_runs(tmp_path / "runs", repository, benchmark, ruleset=ruleset), mlperf_name(benchmark, ruleset)
    assert submit(tmp_path, repository, runs) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out if line.startswith(("PASS", "FAIL"))] == [
        f"PASS system description (official checker, ruleset {ruleset})",
        f"PASS package (official checker, ruleset {ruleset})",
    ]
    folder = tmp_path / "out" / "us"
    for i in range(5):
        copied = folder / "results" / "DESK" / name / f"result_{i}.txt"
        assert copied.read_bytes() == (runs / f"result_{i}.txt").read_bytes()
    code = folder / "benchmarks" / name / "implementations" / "pytorch"
    assert {path.name for path in code.iterdir()} == {*REQUIRED_FILES, "train.py", "DESK_pytorch.json"}
    implementation = json.loads((code / "DESK_pytorch.json").read_text())
    assert implementation["commit"] == git(repository, "rev-parse", "HEAD")
    assert implementation["settings"] == {"ruleset": ruleset, "system": "DESK", "precision": "bf16"}
    assert implementation["hyperparameters"]["global_batch_size"] == RECIPES[benchmark]["global_batch_size"]
    description = json.loads((folder / "systems" / "DESK.json").read_text())
    assert list(description) == list(system_desc.FIELDS)
    status = "Available on-premise" if ruleset >= "4" else "onprem"
    assert (description["submitter"], description["division"], description["status"]) == ("us", "closed", status)
    assert (description["number_of_nodes"], description["cooling"]) == ("1", "air")
    assert (folder.stat().st_mode & 0o777) == 0o755


def test_both_benchmarks_of_a_system_share_a_folder(tmp_path, repository, system, compliant):
    runs = [write_runs(tmp_path / benchmark, repository, benchmark) for benchmark in ("ssd", "maskrcnn")]
    assert submit(tmp_path, repository, *runs) == 0
    assert sorted(path.name for path in (tmp_path / "out/us/results/DESK").iterdir()) == ["maskrcnn", "ssd"]


@pytest.mark.usefixtures("system")
def test_runs_of_another_ruleset_or_benchmark_are_rejected(tmp_path, repository, capsys):
    new = write_runs(tmp_path / "new", repository, "maskrcnn", ruleset="3.1.0")
    old = write_runs(tmp_path / "old", repository, "ssd")
    assert submit(tmp_path, repository, new, old) == 2
    assert "several rulesets (1.1.0, 3.1.0): choose one with --ruleset" in read_error(capsys)
    assert submit(tmp_path, repository, new, "--ruleset", "4.0.0") == 2
    assert "result_0.txt: submission_benchmark is maskrcnn, which 4.0.0 does not have here" in read_error(capsys)
    assert submit(tmp_path, repository, old, "--ruleset", "3.1.0") == 2  # as RetinaNet
    assert "Required EXACTLY_ONE occurrence of 'opt_name'" in read_error(capsys)


@pytest.mark.parametrize("ruleset", ["3.1.0", "4.0.0", "5.1.0"])
@pytest.mark.parametrize("status", ["onprem", "cloud", "preview", "research"])
@pytest.mark.usefixtures("official_checkers_in_process")
def test_official_checker_accepts_every_availability(tmp_path, ruleset, status, capsys):
    folder = tmp_path / "systems"
    folder.mkdir()
    fields = dict.fromkeys(system_desc.FIELDS, "") | {"status": system_desc.availability(status, ruleset)}
    (folder / "DESK.json").write_text(json.dumps(fields))
    (tmp_path / "results").mkdir()
    assert run_official_checkers(tmp_path, "DESK", ruleset)
    (folder / "DESK.json").write_text(json.dumps(fields | {"status": "soon"}))
    assert run_official_checkers(tmp_path, "DESK", ruleset) is (ruleset < "4")


@pytest.mark.usefixtures("system")
def test_run_that_only_the_official_checkers_accept_is_rejected(tmp_path, repository, capsys):
    runs = write_runs(tmp_path / "runs", repository)
    commit = {"value": git(repository, "rev-parse", "HEAD"), "dirty": False}
    config = {"ruleset": "1.1.0", "system": "DESK", "precision": "bf16"}
    (runs / "result_2.txt").unlink()
    write_run(runs / "result_2.txt", minutes=-30, commit=commit, seed=9, platform="1xDESK", config=config)
    assert submit(tmp_path, repository, runs) == 2
    assert "result_2.txt: the clock was set back by" in read_error(capsys)
    assert not (tmp_path / "out").exists()
    assert check.main([str(runs)]) == 1
    out = capsys.readouterr().out
    assert f"FAIL {runs / 'result_2.txt'} (ruleset 1.1.0)\n  the clock was set back by" in out
    assert "score 20.00 minutes" in out  # it counts as the slowest
    (runs / "result_3.txt").unlink()
    write_run(runs / "result_3.txt", minutes=-1, commit=commit, seed=8, platform="1xDESK", config=config)
    assert check.main([str(runs)]) == 1
    assert "no score: 2 of 5 runs" in capsys.readouterr().out


def test_fields_match_those_that_official_checker_misses_in_empty_description(tmp_path, capsys):
    (tmp_path / "systems").mkdir()
    (tmp_path / "systems" / "DESK.json").write_text("{}")
    (tmp_path / "results").mkdir()
    assert not run_official_checkers(tmp_path, "DESK", "1.1.0")
    out = capsys.readouterr().out
    assert "FAIL system description" in out
    assert sorted(set(re.findall(r"Missing field ([\w-]+)", out))) == sorted(system_desc.FIELDS)


def test_package_checker_rejects_runs_that_are_too_fast_or_share_a_seed(
    tmp_path, repository, system, compliant, capsys
):
    assert submit(tmp_path, repository, write_runs(tmp_path / "runs", repository, epochs=45)) == 1
    captured = capsys.readouterr()
    assert "PASS system description" in captured.out
    assert "RCP Test Failed" in captured.out
    shutil.rmtree(tmp_path / "out")
    assert submit(tmp_path, repository, write_runs(tmp_path / "same", repository, seed=3)) == 1
    assert "Seed checker failed" in capsys.readouterr().out


def test_four_runs_cause_a_warning_and_are_rejected_by_official_checker(
    tmp_path, repository, system, compliant, capsys
):
    assert submit(tmp_path, repository, write_runs(tmp_path / "runs", repository, number=4)) == 1
    captured = capsys.readouterr()
    assert "warning: ssd: a result has 5 runs, and these are 4" in captured.err
    assert "found 4, expected 5" in captured.out


def test_one_failed_run_counts_as_slowest_and_two_are_rejected(tmp_path, repository, system, capsys):
    runs = write_runs(tmp_path / "runs", repository)
    for number, status in ((4, 0), (3, 2)):
        log = runs / f"result_{number}.txt"
        log.write_text(log.read_text().replace('"value": 0.231', '"value": 0.2').replace("success", "aborted"))
        assert submit(tmp_path, repository, runs) == status
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        err = read_error(capsys)
        assert f"result_{number}.txt: " in err
        assert ("counts as the slowest" in err) is (status == 0)
    assert err.count("one run of five may fail") == 2
    unnamed = write_runs(tmp_path / "unnamed", repository, number=2, without="weights_initialization")
    assert submit(tmp_path, repository, unnamed) == 2
    assert [line.split(":")[0] for line in read_error(capsys).splitlines()] == ["error", "error"]  # one line each


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"platform": "2xDESK"}, "differ in submission_platform: 1xDESK, 2xDESK"),
        ({"opt_weight_decay": 5e-4}, "differ in opt_weight_decay"),
        ({"config": {"ruleset": "1.1.0", "system": "DESK", "precision": "fp16"}}, "differ in precision"),
        ({"commit": None}, "names no commit"),
        ({"commit": {"value": "unknown", "dirty": None}}, "names no commit"),
        ({"commit": {"value": "0" * 40, "dirty": False}}, "from several commits"),
        ({"org": "them"}, "submission_org is them, and --org is us"),
        ({"division": "open"}, "differ in submission_division: closed, open"),
    ],
    ids=str,
)
def test_run_that_differs_from_the_others_is_named(tmp_path, repository, system, compliant, capsys, changes, message):
    runs = write_runs(tmp_path / "runs", repository, number=2)
    other = write_runs(tmp_path / "other", repository, number=1, seed=9, **changes)
    assert submit(tmp_path, repository, runs, other) == 2
    assert message in read_error(capsys)
    assert not (tmp_path / "out").exists()


def test_runs_without_dropped_caches_cause_a_warning(tmp_path, repository, system, compliant, capsys):
    runs = write_runs(tmp_path / "undropped", repository, number=1, cache_clear=False)
    submit(tmp_path, repository, runs)
    assert "warning: ssd: cache_clear is not true in result_0.txt" in read_error(capsys)
    submit(tmp_path, repository, write_runs(tmp_path / "dropped", repository, number=1), "--implementation", "other")
    assert "cache_clear" not in read_error(capsys)


def test_runs_of_a_dirty_tree_are_rejected(tmp_path, repository, system, compliant, capsys):
    commit = {"value": git(repository, "rev-parse", "HEAD"), "dirty": True}
    assert submit(tmp_path, repository, write_runs(tmp_path / "runs", repository, commit=commit, number=1)) == 2
    assert "files differed from commit" in read_error(capsys)


def test_commit_that_is_missing_or_of_another_program_is_rejected(tmp_path, repository, system, compliant, capsys):
    runs = write_runs(tmp_path / "runs", repository, commit={"value": "1" * 40, "dirty": False}, number=1)
    assert submit(tmp_path, repository, runs) == 2
    assert f"does not have commit {'1' * 40}" in read_error(capsys)
    other = tmp_path / "another"
    shutil.copytree(repository, other)
    (other / "setup.sh").unlink()
    subprocess.run(
        ["git", "-C", other, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qam", "Less"], check=True
    )
    assert submit(tmp_path, other, write_runs(tmp_path / "less", other, number=1)) == 2
    assert "has no setup.sh: it is not this program" in read_error(capsys)
    assert list((tmp_path / "out").iterdir()) == []


def test_existing_folder_is_kept(tmp_path, repository, system, compliant, capsys):
    existing = tmp_path / "out" / "us" / "precious"
    existing.parent.mkdir(parents=True)
    existing.write_text("mine")
    assert submit(tmp_path, repository, write_runs(tmp_path / "runs", repository, number=1)) == 2
    assert "already exists" in read_error(capsys)
    assert existing.read_text() == "mine"


def test_missing_fields_are_named_and_a_template_is_written(tmp_path, repository, system, compliant, capsys):
    runs = write_runs(tmp_path / "runs", repository)
    common = ["--org", "us", "--system", "DESK", "--out", str(tmp_path / "out"), "--repository", str(repository)]
    assert main([*common, str(runs)]) == 2
    template = tmp_path / "out" / "DESK.json"
    assert "does not report host_memory_configuration, cooling." in read_error(capsys)
    fields = json.loads(template.read_text())
    assert [field for field, value in fields.items() if value is None] == ["host_memory_configuration", "cooling"]
    template.write_text(json.dumps(fields | {"host_memory_configuration": "", "cooling": "water", "hw_notes": "old"}))
    assert main([*common, str(runs), "--system-file", str(template), "--set", "hw_notes=new"]) == 0
    description = json.loads((tmp_path / "out/us/systems/DESK.json").read_text())
    assert (description["cooling"], description["hw_notes"]) == ("water", "new")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "color=red"), "color: no such field"),
        (("--set", "cooling"), "write it as FIELD=VALUE"),
        (("--set", "division=open"), "division=open: the logs and --system determine it"),
        (("--division", "open"), "submission_division is closed, and --division is open"),
        (("--system", "../DESK"), "--system ../DESK: not a folder name"),
        (("--system-file", "/absent.json"), "/absent.json: No such file"),
        (("/absent.txt",), "/absent.txt: No such file"),
    ],
    ids=str,
)
def test_invalid_argument_is_one_message(tmp_path, repository, system, compliant, capsys, arguments, message):
    assert submit(tmp_path, repository, write_runs(tmp_path / "runs", repository, number=1), *arguments) == 2
    assert message in read_error(capsys)


def test_text_file_and_repeated_log_are_rejected(tmp_path, repository, system, compliant, capsys):
    (tmp_path / "notes.txt").write_text("hello\n")
    assert submit(tmp_path, repository, tmp_path / "notes.txt") == 2
    assert "has no line with the key submission_org" in read_error(capsys)
    runs = write_runs(tmp_path / "runs", repository, number=1)
    assert submit(tmp_path, repository, runs, runs / "result_0.txt") == 2
    assert "a run is named twice" in read_error(capsys)


def test_description_of_this_machine_has_strings_and_none_for_unknown_fields():
    description = system_desc.system_description(nodes=1)
    assert list(description) == list(system_desc.FIELDS[4:])
    assert all(value is None or isinstance(value, str) for value in description.values())
    assert description["framework"].startswith("PyTorch ")
    assert description["cooling"] is None
    assert system_desc.system_description(nodes=2)["host_networking"] is None


def test_processors_caches_memory_and_disks_are_read_from_kernel_files(tmp_path):
    files = {
        "proc/cpuinfo": "model name\t: A CPU\ncpu MHz\t\t: 2600.0\n",
        "proc/meminfo": "MemTotal:       536870912 kB\n",
        "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "3500000\n",
        "sys/block/nvme0n1/size": "7500000000\n",
        "sys/block/sda/size": "1953125000\n",
        "sys/block/sda/queue/rotational": "1\n",
        "sys/block/loop0/size": "100\n",
    }
    for core in range(8):  # two processors of two cores with two threads each
        topology = f"sys/devices/system/cpu/cpu{core}/topology"
        files |= {f"{topology}/physical_package_id": f"{(core // 2) % 2}\n", f"{topology}/core_id": f"{core % 2}\n"}
    for index, (level, kind, size) in enumerate([(1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", "2M")]):
        cache = f"sys/devices/system/cpu/cpu0/cache/index{index}"
        files |= {f"{cache}/level": f"{level}\n", f"{cache}/type": f"{kind}\n", f"{cache}/size": f"{size}\n"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    description = system_desc.system_description(2, tmp_path)
    assert {field: description[field] for field in description if field.startswith("host_") and description[field]} == {
        "host_processors_per_node": "2",
        "host_processor_model_name": "A CPU",
        "host_processor_core_count": "2",
        "host_processor_vcpu_count": "4",
        "host_processor_frequency": "up to 3.50 GHz",
        "host_processor_caches": "L1d 48K, L1i 32K, L2 2M",
        "host_memory_capacity": "512 GiB",
        "host_storage_type": "HDD, NVMe SSD",
        "host_storage_capacity": "3840 GB + 1000 GB",
    }
    summary = system_desc.system_summary(tmp_path)
    assert (summary["processors"], summary["memory"]) == ("2 × A CPU, 2 cores each", "512 GiB")
    assert "numpy " in summary["software"]
    assert "memory" not in system_desc.system_summary(tmp_path / "absent")


def test_page_names_every_flag_and_its_commands_parse():
    page = (ROOT / "docs" / "SUBMISSION.md").read_text()
    flags = {option for action in make_parser()._actions for option in action.option_strings} - {"-h", "--help"}
    assert [flag for flag in sorted(flags) if flag not in page] == []
    (command,) = re.findall(r"python -m mlperf.submission (.+)", page)
    assert make_parser().parse_args(command.split()).system == "DGXA100"
    for words in re.findall(r"run_and_time.sh (--[^#;\n]+)", page):
        load([word for word in words.split() if word != "--dry-run"], {})


def test_page_quotes_messages_of_the_program():
    _, table = (ROOT / "docs" / "SUBMISSION.md").read_text().split("| message | what to do |\n|---|---|\n")
    source = "".join((ROOT / "mlperf" / name).read_text() for name in ("submission.py", "compliance.py"))
    source = source.replace("{score.RUNS_PER_RESULT}", "5")
    source = re.sub(r'"\n *f?"', "", source)
    quotes = [re.split("; |…", line.split("|")[1]) for line in table.split("\n\n")[0].splitlines()]
    assert [text for texts in quotes for quote in texts if (text := quote.strip(", ")) not in source] == []


def test_commands_of_the_page_score_five_runs_and_build_their_folder(
    tmp_path, repository, system, compliant, monkeypatch, capsys
):
    page = (ROOT / "docs" / "SUBMISSION.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results/DGXA100/ssd").mkdir(parents=True)
    write_runs(tmp_path / "results/DGXA100/ssd/2026-01-31_12-00-00", repository, platform="1xDGXA100", org="O")
    commands = {
        program: [path for word in shlex.split(arguments) for path in glob.glob(word) or [word]]
        for program, arguments in re.findall(r"^\$ \.venv/bin/python -m (\S+) (.+)", page, re.MULTILINE)
    }
    assert check.main(commands.pop("mlperf.check")) == 0
    (result,) = json.loads((tmp_path / "score.json").read_text())
    assert (len(result["runs"]), result["score"]["seconds"]) == (5, pytest.approx(1200))
    assert main([*commands.pop("mlperf.submission"), *MANUAL_FIELDS, "--repository", str(repository)]) == 0
    assert len(list((tmp_path / "results/submission/O/results/DGXA100/ssd").glob("result_?.txt"))) == 5
    assert not commands


def test_commit_that_the_page_passes_to_an_image_is_accepted_by_a_run(repository):
    page = (ROOT / "docs" / "SUBMISSION.md").read_text()
    ((command,),) = [re.findall(r"COMMIT=\"\$\((git [^)]+)\)\"", page)]
    commit = git(repository, *shlex.split(command)[1:])
    assert commit == git(repository, "rev-parse", "HEAD")
    for named in (commit, f"{commit}-dirty"):
        assert load(["--source-commit", named], {}).config.source_commit == named
