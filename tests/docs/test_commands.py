"""Every command in the documents is one that this program accepts, and every link and every named file exists.

Tests of their own run the commands of CLUSTER.md, RECOVERY.md, REPORT.md, SUBMISSION.md and ADDING_A_SYSTEM.md.
"""

import argparse
import functools
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from config_files import exported
from detection.report import data_page
from detection.tuning import search
from maskrcnn import config as maskrcnn_config
from paths import ROOT
from perf import run as perf_run
from retinanet import config as retinanet_config
from ssd import config as ssd_config

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/golden/**/*.md")])
LOAD = {"ssd": ssd_config.load, "maskrcnn": maskrcnn_config.load, "retinanet": retinanet_config.load}
SCRIPT_FLAGS = {"--dry-run", "--preflight", "--model-summary", "--all"}
RUNNERS = ("./run_and_time.sh", "./run_with_docker.sh", "./run.sub")
# Programs of the machine, and scripts whose arguments are those of another program.
OTHERS = {"cd", "cp", "curl", "docker", "git", "kill", "ls", "rm", "scancel", "scontrol"}
OTHERS |= {"./tests/run.sh", "./prepare-json.py", ".ci/run", ".venv/bin/pre-commit", "perf/accelerator.sh"}


INLINE = re.compile(r"((?:\w+=\S* )*)(?:\.venv/bin/)?(python -m [\w.]+ (?!COMMAND|NAME)[\w-]|\./\w+\.sh)")


class Command(NamedTuple):
    """A command of a page: the variables before it, and its words."""

    page: str
    variables: dict[str, str]
    words: list[str]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def inline_code(page: Path) -> list[str]:
    """Return the code spans of a page that concern this program: in tables of two projects, not the first column."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    if page.name in ("MIGRATION.md", "CHANGELOG.md"):
        text = re.sub(r"^\| [^|]+ \|", "|", text, flags=re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", text)


def commands() -> list[Command]:
    """Return the distinct commands with arguments in console blocks and code spans."""
    found = {}
    for page in PAGES:
        blocks = "".join(re.findall(r"^```console\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))
        lines = re.findall(r"^\$ (.*)$", blocks.replace("\\\n", " "), re.MULTILINE)
        for span in inline_code(page):
            if match := INLINE.match(span):
                lines.append(match[1] + span[match.start(2) :].replace("python", ".venv/bin/python", 1))
        for line in lines:
            words = shlex.split(line, comments=True)
            start = next(i for i, word in enumerate(words) if not re.match(r"\w+=", word))
            variables = dict(word.split("=", 1) for word in words[:start])
            found.setdefault(line.split(" #")[0], Command(page.name, variables, words[start:]))
    return list(found.values())


ALL = commands()


def select(*programs: str) -> list[Command]:
    return [command for command in ALL if command.words[0] in programs]


PYTHON = [command for command in select(".venv/bin/python") if command.words[1] == "-m"]


@functools.cache
def usage(script: str) -> str:
    """Return the words of a script's help, with those of the script that it starts."""
    text = (ROOT / script).read_text()
    return text + ((ROOT / "run_and_time.sh").read_text() if script in ("./run.sub", "./run_with_docker.sh") else "")


def test_commands_of_all_pages_are_read():
    assert {"README.md", "MIGRATION.md", "TUTORIAL.md", "CLUSTER.md", "CONTRIBUTING.md"} <= {c.page for c in ALL}
    assert len(ALL) > 80
    known = {*RUNNERS, "./setup.sh", "./init_datasets.sh", "./get_weights.sh", "./get_resnet34_backbone.sh", *OTHERS}
    assert [str(command) for command in ALL if command.words[0] not in known and command not in PYTHON] == [
        str(command) for command in select(".venv/bin/python") if Path(command.words[1]).is_file()
    ]


@pytest.mark.parametrize("command", select(*RUNNERS), ids=str)
def test_run_accepts_the_settings(command):
    variables = dict(command.variables)
    benchmark = variables.pop("BENCHMARK", "ssd")
    system = variables.pop("DGXSYSTEM", "toy").replace("mine", "toy")
    config = system + ("" if benchmark == "ssd" else f"_{benchmark}")
    explained = usage(command.words[0]) + (ROOT / f"config_{config}.sh").read_text()
    assert [name for name in variables if not re.search(rf"\b{name}\b", explained)] == []
    words = [word for word in command.words[1:] if word not in SCRIPT_FLAGS]
    if "--autotune" in words:
        words = list(search.parse_request(words).flags)
    if "--help" in words:
        return
    environment = exported(config, **variables)
    LOAD[benchmark](words, {name: value for name, value in environment.items() if name != "PATH"})


@pytest.mark.parametrize(
    "command", select("./setup.sh", "./init_datasets.sh", "./get_weights.sh", "./get_resnet34_backbone.sh"), ids=str
)
def test_script_explains_the_flags_and_variables(command):
    names = [*command.variables, *(word for word in command.words[1:] if word.startswith("--"))]
    names = [re.sub("INSTALL_ARGS_.*", "INSTALL_ARGS_NAME", name) for name in names]
    assert [name for name in names if not re.search(rf"(?<![\w-]){name}\b", usage(command.words[0]))] == []


class Parsed(Exception):
    """The arguments were accepted."""


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", PYTHON, ids=str)
def test_program_accepts_its_arguments(command, monkeypatch, tmp_path):
    module, *words = command.words[2:]
    if words[:1] == ["data"]:
        words[1:] = data_page.parse(words[1:])[1]
    if module in LOAD and words[0] in ("train", "preflight", "inspect", "tune", "evaluate", "summary", "data"):
        LOAD[module]([*(["--mode", "evaluate"] if words[0] == "evaluate" else []), *words[1:]], {})
        return
    if module == "perf.run":
        assert perf_run.select_parts(perf_run.parse(words), on_cpu=True) or "--compare" in words
        return
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, args=None, namespace=None):
        parse(parser, args, namespace)
        raise Parsed

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings}, target


@functools.cache
def source() -> str:
    """Return the text of all programs, and the flags of all settings."""
    files = [
        path
        for name in ("ssd", "maskrcnn", "retinanet", "detection", "mlperf", "perf")
        for path in (ROOT / name).rglob("*.py")
    ]
    texts = [path.read_text() for path in [*files, *ROOT.glob("*.sh"), *ROOT.glob("*.py"), *ROOT.glob("tests/*.sh")]]
    names = {name for load in LOAD.values() for name in vars(load([], {}).config)}
    return "\n".join([*texts, *(f"--{name.replace('_', '-')}\n--no-{name.replace('_', '-')}" for name in names)])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_flags_exist(page):
    if page.name == "EXPERIMENTS.md":
        return  # it names flags of earlier versions
    flags = {flag for span in inline_code(page) for flag in re.findall(r"(?<!\S)--[a-z][\w-]+", span)}
    foreign = {"--shm-size", "--ipc", "--exclude-editable"}  # of docker and pip
    assert [flag for flag in sorted(flags - foreign) if not re.search(rf"(?<![\w-]){flag}(?![\w-])", source())] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    if page.name in ("CHANGELOG.md", "EXPERIMENTS.md"):
        return  # they name files of earlier versions
    pattern = r"`((?:ssd|maskrcnn|retinanet|detection|mlperf|perf|tests|scripts)/[\w/.]+\.(?:py|sh|md|bats))`"
    assert [name for name in re.findall(pattern, page.read_text()) if not (ROOT / name).exists()] == []


def test_index_lists_every_page():
    index = (ROOT / "docs/README.md").read_text()
    names = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert names == set(re.findall(r"\]\((\w+\.md)\)", index))
