"""Fast test processes, forked from one that has already imported torch.

Importing torch, and its compiler for the first optimizer, takes four seconds. The rest of a dummy run takes a fraction
of one.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch._dynamo", "torch.distributed.run", "ssd.train", "maskrcnn.train"])


class Forked:
    """`python SCRIPT ...` or `python -m MODULE ...` in a new session, with the interface of subprocess.Popen.

    out, err: files for its output, which `communicate` then does not return. Ranks that a launcher starts are new
    processes, as in a run.
    """

    def __init__(self, argv: list[str], environ: dict[str, str], cwd: Path = ROOT, *, out: str = "", err: str = ""):
        self.argv = argv
        self.files = [tempfile.NamedTemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        names = [name or file.name for name, file in zip((out, err), self.files, strict=True)]
        self.process = SERVER.Process(target=run_program, args=(argv, environ, cwd, *names))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.argv, timeout)
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (file.read() for file in self.files)
        return out, err


def run_program(argv: list[str], environ: dict[str, str], cwd: Path, out: str, err: str) -> None:
    """Run the program in this process, with the given environment and output files."""
    os.setsid()
    for stream, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    tempfile.tempdir = None  # from TMPDIR
    torch.set_num_threads(int(environ["OMP_NUM_THREADS"]))
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
