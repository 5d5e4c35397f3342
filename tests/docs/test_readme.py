"""The README's commands: every one in its blocks and its tables "coming from …" is one that this program takes."""

import http.server
import importlib
import os
import re
import shlex
import subprocess
import threading
from pathlib import Path

import pytest

from config_files import exported
from detection.synthetic import toy
from maskrcnn import config as maskrcnn_config
from paths import ROOT
from perf import run as perf_run
from ssd import config as ssd_config

README = (ROOT / "README.md").read_text()


def coming_from() -> list[str]:
    """The second column of the tables."""
    section = README.split("## Coming from")[1].split("\n## ")[0]
    rows = [
        line.split("|") for line in section.splitlines() if line.startswith("| ") and not line.startswith("| there")
    ]
    return [row[2].strip().strip("`") for row in rows]


def shown() -> list[str]:
    """The commands of the blocks, without their comments."""
    blocks = re.findall(r"^```console\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+#.*", "", line.removeprefix("$ ")) for line in lines]


def parts(command: str) -> tuple[dict[str, str], list[str]]:
    """The variables before a command, and its words."""
    words = shlex.split(command)
    first = next(i for i, word in enumerate(words) if not re.match(r"\w+=", word))
    return dict(word.split("=", 1) for word in words[:first]), words[first:]


# What runs the tests is not run by them.
COMMANDS = list(dict.fromkeys(command for command in [*coming_from(), *shown()] if command != "./tests/run.sh"))
RUNS = [command for command in COMMANDS if "./run_and_time.sh" in command]
BENCHES = [command for command in COMMANDS if " -m perf.run " in command and "--compare" not in command]
PROGRAMS = [command for command in shown() if command.startswith(".venv/bin/python -m ") and command not in BENCHES]
OTHERS = [command for command in COMMANDS if command not in RUNS + BENCHES + PROGRAMS]


def test_the_tables_and_the_blocks_are_read():
    assert len(coming_from()) >= 23
    assert len(shown()) >= 30


@pytest.mark.parametrize("command", BENCHES)
def test_the_bench_takes_the_flags_and_names_of_the_readme(command):
    arguments = perf_run.parse(parts(command)[1][3:])
    assert perf_run.select_parts(arguments, on_cpu=True)


@pytest.mark.parametrize("command", [command for command in RUNS if "--help" not in command])
def test_a_run_takes_the_settings_of_the_readme(command):
    variables, words = parts(command)
    benchmark = variables.pop("BENCHMARK", "ssd")
    suffix = "" if benchmark == "ssd" else f"_{benchmark}"
    environment = exported(variables.pop("DGXSYSTEM", "toy") + suffix, **variables)
    load = {"ssd": ssd_config, "maskrcnn": maskrcnn_config}[benchmark].load
    words = [word for word in words[1:] if word not in ("--model-summary", "--dry-run")]
    load(words, {name: value for name, value in environment.items() if name != "PATH"})


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNS)
def test_a_run_of_the_readme_is_what_it_would_start(command, tmp_path):
    done = bash(command if "--help" in command else f"{command} --dry-run", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "launch:" in done.stdout or "--help" in command or "--model-summary" in command


@pytest.mark.parametrize("command", OTHERS)
def test_a_script_of_the_readme_runs(command, tmp_path):
    """For real, up to where it would need what is not here: a registry, a cluster, an SDK."""
    folder = tmp_path / "folder"
    toy.generate(folder / "pictures", toy.ToySpec(train_images=1, val_images=1, seed=1))
    (folder / "corex-1.0.run").write_text('echo "installer $1"; exit 9\n')
    (folder / "torch-1-py3-none-any.whl").touch()
    for name in ("docker", "sbatch"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "{tmp_path}/calls"\n')
        (tmp_path / name).chmod(0o755)
    done = bash(command, tmp_path)
    said = done.stdout + done.stderr
    calls = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
    program = parts(command)[1][0]
    match program:
        case "./prepare-json.py":
            assert done.returncode == 0, said
            assert (tmp_path / "OUT.json").exists()
        case "./run_with_docker.sh":
            assert calls.count("docker run") >= 5, said
        case "./run.sub":
            assert "sbatch --nodes=2" in calls, said
        case "./setup.sh":
            assert done.returncode == 1
            assert "installer --silent" in said
        case "./init_datasets.sh" | "./get_resnet34_backbone.sh":
            assert done.returncode not in (0, 2)
            assert "404" in said
        case "curl":
            assert done.returncode == 22, said  # 404
        case _:
            assert (program, "detect_images" in command, done.returncode) == (".venv/bin/python", True, 2)
            assert "no such file" in said


@pytest.mark.parametrize("command", PROGRAMS)
def test_a_program_of_the_readme_takes_its_flags_and_misses_the_files(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, words = parts(command)
    program = importlib.import_module(words[2])
    try:
        status = program.main(words[3:])
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr().err
    assert status == 2
    assert "usage:" not in said
    assert re.search(r"no such file|is no (file|folder)|cannot be read|not there|holds no", said.lower()), said


def bash(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the README from the project's folder, with its words for what a user has replaced."""
    annotations = folder / "folder/pictures/annotations/instances_val2017.json"
    with loopback() as url:
        for word, meant in {
            "URL": url,
            "IN.json": annotations,
            "OUT.json": folder / "OUT.json",
            "DIR": folder / "folder",
            "FILE": folder / "checkpoint.pt",
            "F.json": folder / "summary.json",
            "/data/coco": folder / "coco",
            "https://download.pytorch.org/models": url,
            "https://dl.fbaipublicfiles.com": url,
            ".venv/bin/python": f"{os.environ.get('VENV', '.venv')}/bin/python",
        }.items():
            command = re.sub(rf"(?<![\w.]){re.escape(word)}(?!\w)", str(meant), command)
        environment = os.environ | {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "BACKBONE_URL": f"{url}/resnet34-333f7ec4.pth",
            "COCO_URL": url,
            "PRETRAINED_DIR": str(folder / "folder"),
            "no_proxy": "127.0.0.1",
        }
        return subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


class loopback:
    """A server that has nothing."""

    def __enter__(self) -> str:
        self.server = http.server.HTTPServer(("127.0.0.1", 0), Quiet)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class Quiet(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass
