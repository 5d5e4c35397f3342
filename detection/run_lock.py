"""Lock of a run folder, which belongs to one run at a time.

Imported outside the environment and containers, too: needs Python 3.8 and no packages.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mlperf.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK = ".lock"
WAIT_S = 1.0  # another process may check for a moment whether the folder is free


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Create a run folder if needed, and hold its lock. Raise InputError if another process does, and name it.

    It is a POSIX record lock, which also holds between the hosts of a network file system. The kernel drops it when
    this process dies, and the data workers do not inherit it. The file stays: another process may be opening it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "ab+", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise InputError(
            f"run folder {folder}: cannot be written ({error.strerror}). Choose another LOGDIR or RUN_DIR."
        ) from error
    with file:
        try:
            _acquire(file.fileno())
        except BlockingIOError:
            file.seek(0)
            host, _, pid = (file.read(500).decode(errors="replace").strip() or "unknown unknown").partition(" ")
            raise InputError(
                f"run folder {folder}: in use by process {pid} on host {host}. Wait until it ends, end it, or choose "
                "another RUN_DIR."
            ) from None
        except OSError as error:
            print(f"warning: {folder} cannot be locked ({error.strerror}). Start no other run in it", file=sys.stderr)
        with suppress(OSError):  # the disk is full: the lock holds without the name of its holder
            file.truncate(0)
            file.write(f"{socket.gethostname()} {os.getpid()}\n".encode())
        yield


def _acquire(descriptor: int) -> None:
    """Lock a file. Raise BlockingIOError if another process keeps it locked."""
    end_s = time.monotonic() + WAIT_S
    while True:
        try:
            return fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            if time.monotonic() > end_s:
                raise BlockingIOError from error
        time.sleep(0.1)
