"""docs/ADDING_A_BENCHMARK.md: its command runs, and what it names is there."""

import re
import subprocess
import sys

from paths import ROOT

PAGE = (ROOT / "docs" / "ADDING_A_BENCHMARK.md").read_text()


def test_the_command_of_the_page_is_a_whole_run(tmp_path):
    (command,) = re.findall(r"^\$ (.*)$", PAGE, flags=re.MULTILINE)
    words = command.replace(".venv/bin/python", sys.executable).replace("RUN", str(tmp_path / "run")).split()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert "ended after epoch" in done.stdout, done.stderr
    assert (tmp_path / "run" / "result_0.txt").exists()


def test_every_file_that_the_page_names_is_there():
    named = set(re.findall(r"`((?:ssd|maskrcnn|detection|mlperf|tests)/[\w/.]+|systems\.sh|pyproject\.toml)`", PAGE))
    assert len(named) > 8
    for name in named:
        assert (ROOT / name).exists(), name
