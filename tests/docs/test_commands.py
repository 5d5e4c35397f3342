"""Every command in the documents is one that this program accepts, and every link and every named file exists.

Tests of their own run the commands of CLUSTER.md, RECOVERY.md, REPORT.md, SUBMISSION.md and ADDING_A_SYSTEM.md.
"""

import argparse
import functools
import importlib.util
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from config_files import exported
from detection import cli
from detection.tuning import search
from maskrcnn import config as maskrcnn_config
from maskrcnn.__main__ import COMMANDS as MASKRCNN
from paths import ROOT
from perf import run as perf_run
from ssd import config as ssd_config
from ssd.__main__ import COMMANDS as SSD

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/golden/**/*.md")])
LOAD = {"ssd": ssd_config.load, "maskrcnn": maskrcnn_config.load}
COMMANDS = {"ssd": SSD, "maskrcnn": MASKRCNN}
SCRIPT_FLAGS = {"--dry-run", "--preflight", "--model-summary", "--all"}
RUNNERS = ("./run_and_time.sh", "./run_with_docker.sh", "./run.sub")
# Programs of the machine, and scripts whose arguments are those of another program.
OTHERS = {"cd", "cp", "curl", "docker", "git", "kill", "ls", "rm", "scancel", "scontrol"}
OTHERS |= {"./tests/run.sh", "./prepare-json.py", ".ci/run", ".venv/bin/pre-commit", "perf/accelerator.sh"}


class Command(NamedTuple):
    """A command of a page: the variables before it, and its words."""

    page: str
    variables: dict[str, str]
    words: list[str]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def commands() -> list[Command]:
    """Return the distinct commands of the console blocks and of MIGRATION.md's middle column."""
    found = {}
    for page in PAGES:
        text = page.read_text()
        blocks = "".join(re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
        lines = re.findall(r"^\$ (.*)$", blocks, re.MULTILINE)
        if page.name == "MIGRATION.md":
            lines += re.findall(r"^\| [^|]+ \| `([^`|]+)` \|", text, re.MULTILINE)
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
    known = {*RUNNERS, "./setup.sh", "./init_datasets.sh", "./get_resnet34_backbone.sh", *OTHERS}
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


@pytest.mark.parametrize("command", select("./setup.sh", "./init_datasets.sh", "./get_resnet34_backbone.sh"), ids=str)
def test_script_explains_the_flags_and_variables(command):
    names = [*command.variables, *(word for word in command.words[1:] if word.startswith("--"))]
    names = [re.sub("INSTALL_ARGS_.*", "INSTALL_ARGS_NAME", name) for name in names]
    assert [name for name in names if not re.search(rf"(?<![\w-]){name}\b", usage(command.words[0]))] == []


class Parsed(Exception):
    """The arguments were accepted."""


@pytest.mark.parametrize("command", PYTHON, ids=str)
def test_program_accepts_its_arguments(command, monkeypatch, tmp_path):
    module, *words = command.words[2:]
    if module in LOAD and words[0] in ("train", "preflight", "inspect", "tune", "evaluate", "summary"):
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
    if module in LOAD:
        main = functools.partial(cli.main, commands=COMMANDS[module])
    else:
        name = f"{module}.__main__" if importlib.util.find_spec(module).submodule_search_locations else module
        main = importlib.import_module(name).main
    with pytest.raises(Parsed):
        main(words)


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    if page.name in ("CHANGELOG.md", "EXPERIMENTS.md"):
        return  # they name files of earlier versions
    pattern = r"`((?:ssd|maskrcnn|detection|mlperf|perf|tests|scripts)/[\w/.]+\.(?:py|sh|md|bats))`"
    assert [name for name in re.findall(pattern, page.read_text()) if not (ROOT / name).exists()] == []


def test_index_lists_every_page():
    index = (ROOT / "docs/README.md").read_text()
    names = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md", "COMPATIBILITY.md"}
    assert names == set(re.findall(r"\]\((\w+\.md)\)", index))
