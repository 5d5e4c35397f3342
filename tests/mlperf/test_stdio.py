"""Programs whose output cannot be written, in processes of their own."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stdout

import pytest

from mlperf import stdio
from paths import ROOT

PROGRAM = """
import sys
from pathlib import Path
from mlperf import stdio
stdio.STUCK_S = 0.2
stdio.ignore_write_errors()
for _ in range(3000):
    print("line × " * 10, flush=True)
    print("line × " * 10, file=sys.stderr)
Path(sys.argv[1]).write_text("end")
"""
COMMAND = [sys.executable, "-c", PROGRAM]


def run_in_shell(redirection, end, **extra):
    shell = f'"$@" {redirection}'
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **extra}
    return subprocess.run(
        ["bash", "-c", shell, "bash", *COMMAND, str(end)],
        env=environ, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    "redirection",
    [
        ">/dev/full",
        "2>/dev/full >/dev/null",
        ">&- 2>&-",
        ">&- 2>/dev/null <&-",
        "2>&1 | true",
        "2>&1 | head -n 1",
        "2>&1 | sleep 3",  # a reader that does not read
    ],
)
def test_output_that_cannot_be_written_ends_no_program(tmp_path, redirection):
    done = run_in_shell(f"{redirection}; exit ${{PIPESTATUS[0]}}", tmp_path / "end")
    assert done.returncode == 0
    assert (tmp_path / "end").read_text() == "end"
    assert "Error" not in done.stderr


def test_closed_terminal_ends_no_program(tmp_path):
    terminal, stream = os.openpty()
    process = subprocess.Popen(
        [*COMMAND, str(tmp_path / "end")], cwd=ROOT, stdin=stream, stdout=stream, stderr=stream, start_new_session=True
    )
    os.close(stream)
    os.close(terminal)
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "end").exists()


def test_a_slow_reader_gets_every_line_in_order(tmp_path):
    program = PROGRAM.replace("line ×", "{_} ×").replace('"{_}', 'f"{_}').replace("stdio.STUCK_S = 0.2", "")
    command = [sys.executable, "-c", program, str(tmp_path / "end")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    lines = process.stdout.readlines()
    assert process.wait(timeout=60) == 0
    assert [int(line.split(" ")[0]) for line in lines] == list(range(3000))


def test_characters_that_the_encoding_lacks_are_escaped(tmp_path):
    done = run_in_shell("2>/dev/null", tmp_path / "end", PYTHONIOENCODING="ascii")
    assert done.stdout.startswith("line \\xd7 line")


def test_a_stream_redirected_in_python_stays():
    with redirect_stdout(io.StringIO()) as output:
        stdio.ignore_write_errors()
        print("kept")
    assert output.getvalue() == "kept\n"
