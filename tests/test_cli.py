import subprocess
import sys

import pytest

import commands
from detection import cli
from paths import ROOT

PROGRAM = (
    "import sys; from {package}.__main__ import COMMANDS, cli; status = 0\n{call}\nsys.exit('torch' in sys.modules)"
)


def test_commands_are_listed_one_per_line(capsys):
    assert commands.ssd() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [name for name in cli.HELP if any(line.split()[:1] == [name] for line in lines)] == list(cli.HELP)
    assert max(map(len, lines)) <= 120


def test_unknown_command_suggests_a_similar_one(capsys):
    assert commands.ssd("trian") == 2
    assert "trian: no such command. Did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["ssd", "maskrcnn", "retinanet"])
def test_no_help_imports_torch(package):
    call = """
cli.main([], COMMANDS)
for name in cli.HELP:
    try:
        cli.main([name, "--help"], COMMANDS)
    except SystemExit:
        pass
"""
    program = PROGRAM.format(package=package, call=call)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == 1 + len(cli.HELP)
