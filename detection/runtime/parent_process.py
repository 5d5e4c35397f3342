"""End of a process when its parent dies, so that SIGKILL leaves no orphans.

Imported outside the environment and containers, too: needs Python 3.8 and no packages.
"""

import ctypes
import os
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1
POLL_INTERVAL_S = 1.0


def set_death_signal() -> bool:
    """Make the kernel send SIGTERM to this process when its parent dies. Return whether the kernel can."""
    if sys.platform != "linux":
        return False
    return ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM) == 0


def end_with_parent(parent_pid: int = 0) -> None:
    """Send SIGTERM to this process when its parent dies. parent_pid: the parent, which may have died already."""
    parent_pid = parent_pid or os.getppid()
    if not set_death_signal():
        threading.Thread(target=_wait_for_end, args=(parent_pid,), name="parent", daemon=True).start()
    elif os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGTERM)


def _wait_for_end(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(POLL_INTERVAL_S)
    os.kill(os.getpid(), signal.SIGTERM)
