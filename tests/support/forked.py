"""Fast test processes, forked from one that has already imported torch.

Importing torch, and its compiler for the first optimizer, takes four to seven seconds. The rest of a dummy run takes a
fraction of one.
"""

import logging
import multiprocessing
import os
import runpy
import signal
import stat
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

ROOT = Path(__file__).resolve().parents[2]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch._dynamo", "torch.distributed.run", "ssd.train", "maskrcnn.train"])


class Forked:
    """`python SCRIPT ...` or `python -m MODULE ...` in a new session, with the interface of subprocess.Popen.

    out, err: files for its output, which `communicate` then does not return. A launcher forks its ranks, unless
    NEW_INTERPRETERS is set: then they are new processes, as in a run. start: how to fork.
    """

    def __init__(
        self, argv: list[str], environ: dict[str, str], cwd: Path = ROOT, *, out: str = "", err: str = "", start=SERVER
    ):
        self.argv = argv
        self.files = [tempfile.NamedTemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        names = [name or file.name for name, file in zip((out, err), self.files, strict=True)]
        self.process = start.Process(target=run_program, args=(argv, environ, cwd, *names))
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
    forget_parent()
    for stream, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    tempfile.tempdir = None  # from TMPDIR
    torch.set_num_threads(int(environ["OMP_NUM_THREADS"]))
    if argv[:2] == ["-m", "detection.runtime.launch"] and "NEW_INTERPRETERS" not in environ:
        fork_ranks(out, err)
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


def forget_parent() -> None:
    """Drop what a new interpreter does not inherit: signal handlers, disabled logging, and sockets."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.disable(logging.NOTSET)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # that of the listing is closed
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.close(descriptor)


def fork_ranks(out: str, err: str) -> None:
    """Make the launcher in this process fork its ranks."""

    def fork_rank(_: SubprocessHandler, args: tuple[str, ...], environ: dict[str, str]) -> Forked:
        program = list(args[args.index("-u") + 1 :])
        return Forked(program, environ, Path.cwd(), out=out, err=err, start=multiprocessing.get_context("fork"))

    SubprocessHandler._popen = fork_rank
