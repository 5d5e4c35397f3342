"""Standard output and error of a program that must go on when nobody reads them.

Imported outside the environment and containers, too: needs Python 3.8 and no packages.
"""

from __future__ import annotations

import io
import os
import select
import sys
from contextlib import suppress
from typing import Any

STUCK_S = 2.0  # how long a reader may pause before the output is dropped


class LossyFile(io.RawIOBase):
    """Writer to a file descriptor that drops what cannot be written.

    The reader is gone, the terminal is closed, the disk is full, or the reader takes nothing for STUCK_S.
    """

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.poll = select.poll()
        self.poll.register(descriptor, select.POLLOUT)
        self.is_stuck = False

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the file descriptor, for libraries that write to it themselves."""
        return self.descriptor

    def isatty(self) -> bool:
        """Return whether this is a terminal."""
        return os.isatty(self.descriptor)

    def write(self, data: Any, /) -> int:
        """Write what can be written of bytes or a buffer, and return its length."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and self.is_ready():
                chunk = bytes(rest[: select.PIPE_BUF])  # so much does not block
                # Whole lines, since the ranks write to the same file.
                rest = rest[os.write(self.descriptor, chunk[: chunk.rfind(b"\n") + 1] or chunk) :]
        except OSError:
            pass
        return size

    def is_ready(self) -> bool:
        """Return whether a write would not block. Wait for the reader once, and no longer after it did not read."""
        self.is_stuck = not self.poll.poll(0 if self.is_stuck else STUCK_S * 1000)
        return not self.is_stuck


def ignore_write_errors() -> None:
    """Make this process drop output that cannot be written or encoded, instead of ending or waiting for a reader.

    A stream that the caller has redirected in Python, such as to a buffer, stays.
    """
    for descriptor, name in ((0, ""), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:  # closed by the caller: the next file that is opened would take its number
            os.open(os.devnull, os.O_RDWR)
        if name and not is_redirected(stream := getattr(sys, name), descriptor):
            with suppress(OSError, AttributeError):
                stream.flush()
            buffer = io.BufferedWriter(LossyFile(descriptor))
            encoding = getattr(stream, "encoding", None)
            text = io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=True)
            setattr(sys, name, text)


def is_redirected(stream: Any, descriptor: int) -> bool:
    """Return whether a stream of Python writes elsewhere than to a descriptor. A closed one is None."""
    try:
        return stream is not None and stream.fileno() != descriptor
    except (OSError, ValueError, AttributeError):
        return not getattr(stream, "closed", False)
