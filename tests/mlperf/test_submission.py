"""From five runs to a folder that the official checkers accept, and one message for whatever is wrong with them."""

import glob
import json
import re
import shlex
import shutil
import subprocess

import pytest

from git_repository import git
from mlperf import check, compliance, system_desc
from mlperf.compliance import Verdict
from mlperf.rules import BENCHMARKS, RULESETS
from mlperf.submission import CODE, main, parser, show_verdict
from paths import ROOT
from ssd.config import load
from synthetic_log import write_run

BY_HAND = ("--set", "host_memory_configuration=2 × 12 GiB", "--set", "cooling=air")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A repository whose one commit has the files that an implementation needs."""
    root = tmp_path_factory.mktemp("program")
    for name in (*CODE, "train.py"):
        (root / name).write_text(f"# {name}\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "All")
    return root


@pytest.fixture
def described(monkeypatch):
    """A machine that tells everything but how it is cooled and how its memory is made up."""
    told = dict.fromkeys(system_desc.FIELDS[4:], "some") | dict.fromkeys(("host_memory_configuration", "cooling"))
    monkeypatch.setattr(system_desc, "describe", lambda nodes: told | {"number_of_nodes": str(nodes)})


@pytest.fixture
def compliant(monkeypatch):
    """Every log complies: what the compliance checker says of one is not what is tested, and takes its time."""
    monkeypatch.setattr(compliance, "check", lambda path, ruleset: Verdict(True, ruleset, []))


def five(folder, repository, benchmark="ssd", number=5, **changes):
    folder.mkdir()
    commit = {"value": git(repository, "rev-parse", "HEAD"), "dirty": False}
    values = {"platform": "1xDESK", "commit": commit, "benchmark": benchmark} | changes
    config = {"ruleset": values.pop("ruleset", "1.1.0"), "system": "DESK", "precision": "bf16"}
    for i in range(number):
        settings = config | {"experiment": i}
        write_run(folder / f"result_{i}.txt", **{"seed": i, "config": settings} | values)
    return folder


def submit(tmp_path, repository, *words):
    where = ("--org", "us", "--system", "DESK", "--out", str(tmp_path / "out"), "--repository", str(repository))
    return main([*where, *BY_HAND, *map(str, words)])


def mistake(capsys):
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("benchmark", "ruleset"),
    [
        pytest.param(benchmark, ruleset, marks=() if (benchmark, ruleset) == ("ssd", "1.1.0") else pytest.mark.slow)
        for benchmark in BENCHMARKS
        for ruleset in RULESETS
    ],
)
def test_five_runs_become_a_folder_that_the_official_checkers_accept(
    tmp_path, repository, described, capsys, benchmark, ruleset
):
    runs = five(tmp_path / "runs", repository, benchmark, ruleset=ruleset)
    assert submit(tmp_path, repository, runs) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in out if line.startswith(("PASS", "FAIL"))] == [
        f"PASS system description (official checker, ruleset {ruleset})",
        f"PASS package (official checker, ruleset {ruleset})",
    ]
    folder = tmp_path / "out" / "us"
    for i in range(5):
        logged = folder / "results" / "DESK" / benchmark / f"result_{i}.txt"
        assert logged.read_bytes() == (runs / f"result_{i}.txt").read_bytes()
    code = folder / "benchmarks" / benchmark / "implementations" / "pytorch"
    assert {path.name for path in code.iterdir()} == {*CODE, "train.py", "DESK_pytorch.json"}
    facts = json.loads((code / "DESK_pytorch.json").read_text())
    assert facts["commit"] == git(repository, "rev-parse", "HEAD")
    assert facts["settings"] == {"ruleset": ruleset, "system": "DESK", "precision": "bf16"}
    assert facts["hyperparameters"]["global_batch_size"] in (96, 960)
    description = json.loads((folder / "systems" / "DESK.json").read_text())
    assert list(description) == list(system_desc.FIELDS)
    assert (description["submitter"], description["division"], description["status"]) == ("us", "closed", "onprem")
    assert (description["number_of_nodes"], description["cooling"]) == ("1", "air")
    assert (folder.stat().st_mode & 0o777) == 0o755


def test_both_benchmarks_of_a_system_share_a_folder(tmp_path, repository, described, compliant):
    runs = [five(tmp_path / benchmark, repository, benchmark) for benchmark in BENCHMARKS]
    assert submit(tmp_path, repository, *runs) == 0
    assert sorted(path.name for path in (tmp_path / "out/us/results/DESK").iterdir()) == ["maskrcnn", "ssd"]


def test_the_fields_are_those_that_the_official_checker_misses_in_an_empty_description(tmp_path, capsys):
    (tmp_path / "systems").mkdir()
    (tmp_path / "systems" / "DESK.json").write_text("{}")
    (tmp_path / "results").mkdir()
    assert not show_verdict(tmp_path, "DESK", "1.1.0")
    out = capsys.readouterr().out
    assert "FAIL system description" in out
    assert sorted(set(re.findall(r"Missing field ([\w-]+)", out))) == sorted(system_desc.FIELDS)


def test_the_official_package_checker_refuses_a_folder_whose_runs_are_too_fast_or_share_a_seed(
    tmp_path, repository, described, compliant, capsys
):
    assert submit(tmp_path, repository, five(tmp_path / "runs", repository, epochs=45)) == 1
    captured = capsys.readouterr()
    assert "PASS system description" in captured.out
    assert "RCP Test Failed" in captured.out
    shutil.rmtree(tmp_path / "out")
    assert submit(tmp_path, repository, five(tmp_path / "same", repository, seed=3)) == 1
    assert "Seed checker failed" in capsys.readouterr().out


def test_four_runs_are_warned_of_and_refused_by_the_official_checker(
    tmp_path, repository, described, compliant, capsys
):
    assert submit(tmp_path, repository, five(tmp_path / "runs", repository, number=4)) == 1
    captured = capsys.readouterr()
    assert "warning: ssd: a result has 5 runs, and these are 4" in captured.err
    assert "found 4, expected 5" in captured.out


def test_one_run_below_the_target_counts_as_the_slowest_and_two_are_refused(tmp_path, repository, described, capsys):
    runs = five(tmp_path / "runs", repository)
    for number, status in ((4, 0), (3, 2)):
        log = runs / f"result_{number}.txt"
        log.write_text(log.read_text().replace('"value": 0.231', '"value": 0.2').replace("success", "aborted"))
        assert submit(tmp_path, repository, runs) == status
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        err = mistake(capsys)
        assert f"result_{number}.txt: " in err
        assert ("counts as the slowest" in err) is (status == 0)
    assert err.count("one run of five may fail") == 2
    untold = five(tmp_path / "untold", repository, number=2, without="weights_initialization")
    assert submit(tmp_path, repository, untold) == 2
    assert [line.split(":")[0] for line in mistake(capsys).splitlines()] == ["error", "error"]  # a line each


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"platform": "2xDESK"}, "differ in submission_platform: 1xDESK, 2xDESK"),
        ({"opt_weight_decay": 5e-4}, "differ in opt_weight_decay"),
        ({"config": {"ruleset": "1.1.0", "system": "DESK", "precision": "fp16"}}, "differ in precision"),
        ({"commit": None}, "names no commit"),
        ({"commit": {"value": "unknown", "dirty": None}}, "names no commit"),
        ({"commit": {"value": "0" * 40, "dirty": False}}, "of several commits"),
        ({"org": "them"}, "submission_org is them, and --org is us"),
        ({"division": "open"}, "differ in submission_division: closed, open"),
    ],
    ids=str,
)
def test_a_run_that_does_not_belong_to_the_others_is_named(
    tmp_path, repository, described, compliant, capsys, changes, message
):
    runs = five(tmp_path / "runs", repository, number=2)
    other = five(tmp_path / "other", repository, number=1, seed=9, **changes)
    assert submit(tmp_path, repository, runs, other) == 2
    assert message in mistake(capsys)
    assert not (tmp_path / "out").exists()


def test_runs_before_which_no_caches_were_dropped_are_warned_of(tmp_path, repository, described, compliant, capsys):
    kept = five(tmp_path / "kept", repository, number=1, cache_clear=False)
    submit(tmp_path, repository, kept)
    assert "warning: ssd: cache_clear is not true in result_0.txt" in mistake(capsys)
    submit(tmp_path, repository, five(tmp_path / "dropped", repository, number=1), "--implementation", "other")
    assert "cache_clear" not in mistake(capsys)


def test_runs_of_a_changed_tree_are_refused(tmp_path, repository, described, compliant, capsys):
    commit = {"value": git(repository, "rev-parse", "HEAD"), "dirty": True}
    assert submit(tmp_path, repository, five(tmp_path / "runs", repository, commit=commit, number=1)) == 2
    assert "files differed from commit" in mistake(capsys)


def test_a_commit_that_the_repository_lacks_or_that_is_not_this_program_is_refused(
    tmp_path, repository, described, compliant, capsys
):
    runs = five(tmp_path / "runs", repository, commit={"value": "1" * 40, "dirty": False}, number=1)
    assert submit(tmp_path, repository, runs) == 2
    assert f"does not give commit {'1' * 40}" in mistake(capsys)
    other = tmp_path / "another"
    shutil.copytree(repository, other)
    (other / "setup.sh").unlink()
    subprocess.run(
        ["git", "-C", other, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qam", "Less"], check=True
    )
    assert submit(tmp_path, other, five(tmp_path / "less", other, number=1)) == 2
    assert "has no setup.sh: it is not this program" in mistake(capsys)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_is_there_is_kept(tmp_path, repository, described, compliant, capsys):
    kept = tmp_path / "out" / "us" / "precious"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    assert submit(tmp_path, repository, five(tmp_path / "runs", repository, number=1)) == 2
    assert "is there already" in mistake(capsys)
    assert kept.read_text() == "mine"


def test_fields_that_the_machine_does_not_tell_are_asked_for_and_a_draft_awaits_them(
    tmp_path, repository, described, compliant, capsys
):
    runs = five(tmp_path / "runs", repository)
    words = ["--org", "us", "--system", "DESK", "--out", str(tmp_path / "out"), "--repository", str(repository)]
    assert main([*words, str(runs)]) == 2
    draft = tmp_path / "out" / "DESK.json"
    assert "does not tell host_memory_configuration, cooling." in mistake(capsys)
    fields = json.loads(draft.read_text())
    assert [field for field, value in fields.items() if value is None] == ["host_memory_configuration", "cooling"]
    draft.write_text(json.dumps(fields | {"host_memory_configuration": "", "cooling": "water", "hw_notes": "old"}))
    assert main([*words, str(runs), "--system-file", str(draft), "--set", "hw_notes=new"]) == 0
    description = json.loads((tmp_path / "out/us/systems/DESK.json").read_text())
    assert (description["cooling"], description["hw_notes"]) == ("water", "new")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "colour=red"), "colour: no such field"),
        (("--set", "cooling"), "write it as FIELD=VALUE"),
        (("--set", "division=open"), "division=open: it follows the logs"),
        (("--division", "open"), "submission_division is closed, and --division is open"),
        (("--system", "../DESK"), "--system ../DESK: it names a folder"),
        (("--system-file", "/absent.json"), "/absent.json: No such file"),
        (("/absent.txt",), "/absent.txt: No such file"),
    ],
    ids=str,
)
def test_a_mistaken_argument_is_one_message(tmp_path, repository, described, compliant, capsys, words, message):
    assert submit(tmp_path, repository, five(tmp_path / "runs", repository, number=1), *words) == 2
    assert message in mistake(capsys)


def test_a_text_that_is_no_log_and_a_log_named_twice_are_refused(tmp_path, repository, described, compliant, capsys):
    (tmp_path / "notes.txt").write_text("hello\n")
    assert submit(tmp_path, repository, tmp_path / "notes.txt") == 2
    assert "has no line with the key submission_org" in mistake(capsys)
    runs = five(tmp_path / "runs", repository, number=1)
    assert submit(tmp_path, repository, runs, runs / "result_0.txt") == 2
    assert "a log is named twice" in mistake(capsys)


def test_this_machine_is_described_in_texts_and_what_it_does_not_tell_is_none():
    described = system_desc.describe(nodes=1)
    assert list(described) == list(system_desc.FIELDS[4:])
    assert all(value is None or isinstance(value, str) for value in described.values())
    assert described["framework"].startswith("PyTorch ")
    assert described["cooling"] is None
    assert system_desc.describe(nodes=2)["host_networking"] is None


def test_processors_caches_memory_and_disks_are_read_from_the_kernels_files(tmp_path):
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
        files |= {f"{topology}/physical_package_id": f"{core // 2 % 2}\n", f"{topology}/core_id": f"{core % 2}\n"}
    for index, (level, kind, size) in enumerate([(1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", "2M")]):
        cache = f"sys/devices/system/cpu/cpu0/cache/index{index}"
        files |= {f"{cache}/level": f"{level}\n", f"{cache}/type": f"{kind}\n", f"{cache}/size": f"{size}\n"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    described = system_desc.describe(2, tmp_path)
    assert {field: described[field] for field in described if field.startswith("host_") and described[field]} == {
        "host_processors_per_node": "2",
        "host_processor_model_name": "A CPU",
        "host_processor_core_count": "2",
        "host_processor_vcpu_count": "4",
        "host_processor_frequency": "3.50 GHz at most",
        "host_processor_caches": "L1d 48K, L1i 32K, L2 2M",
        "host_memory_capacity": "512 GiB",
        "host_storage_type": "HDD, NVMe SSD",
        "host_storage_capacity": "3840 GB + 1000 GB",
    }
    told = system_desc.summary(tmp_path)
    assert (told["processors"], told["memory"]) == ("2 × A CPU, 2 cores each", "512 GiB")
    assert "numpy " in told["software"]
    assert "memory" not in system_desc.summary(tmp_path / "absent")


def test_the_page_names_every_flag_and_its_commands_are_taken():
    page = (ROOT / "docs" / "SUBMISSION.md").read_text()
    flags = {option for action in parser()._actions for option in action.option_strings} - {"-h", "--help"}
    assert [flag for flag in sorted(flags) if flag not in page] == []
    (command,) = re.findall(r"python -m mlperf.submission (.+)", page)
    assert parser().parse_args(command.split()).system == "DGXA100"
    for words in re.findall(r"run_and_time.sh (--[^#;\n]+)", page):
        load([word for word in words.split() if word != "--dry-run"], {})


def test_the_commands_of_the_page_judge_five_runs_and_make_their_folder(
    tmp_path, repository, described, compliant, monkeypatch, capsys
):
    page = (ROOT / "docs" / "SUBMISSION.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results/DGXA100/ssd").mkdir(parents=True)
    five(tmp_path / "results/DGXA100/ssd/2026-01-31_12-00-00", repository, platform="1xDGXA100", org="O")
    commands = {
        program: [found for word in shlex.split(words) for found in glob.glob(word) or [word]]
        for program, words in re.findall(r"^\$ \.venv/bin/python -m (\S+) (.+)", page, re.MULTILINE)
    }
    assert check.main(commands.pop("mlperf.check")) == 0
    (result,) = json.loads((tmp_path / "score.json").read_text())
    assert (len(result["runs"]), result["score"]["seconds"]) == (5, pytest.approx(1200))
    assert main([*commands.pop("mlperf.submission"), *BY_HAND, "--repository", str(repository)]) == 0
    assert len(list((tmp_path / "results/submission/O/results/DGXA100/ssd").glob("result_?.txt"))) == 5
    assert not commands


def test_the_commit_that_the_page_gives_an_image_is_one_that_a_run_takes(repository):
    page = (ROOT / "docs" / "SUBMISSION.md").read_text()
    ((command,),) = [re.findall(r"COMMIT=\"\$\((git [^)]+)\)\"", page)]
    commit = git(repository, *shlex.split(command)[1:])
    assert commit == git(repository, "rev-parse", "HEAD")
    for named in (commit, f"{commit}-dirty"):
        assert load(["--source-commit", named], {}).config.source_commit == named
