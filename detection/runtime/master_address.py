"""Check that node 0 can be reached, before the launchers wait for each other.

torch's store would try to connect for ten minutes, and wait forever for a service that does not answer.
"""

import socket
import threading
import time
from collections.abc import Callable

from detection.config.settings import InputError

TIMEOUT_S = 15.0
RETRY_S = 0.5


def check(address: str, port: int, node_rank: int, connect_store: Callable[[], object]) -> None:
    """Raise InputError unless node 0 answers within TIMEOUT_S or, as before it has started, refuses connections.

    connect_store: connect to the store of node 0, or raise RuntimeError.
    """
    problem = "no answer"

    def run() -> None:
        nonlocal problem
        while problem:
            try:
                if node_rank == 0:
                    probe_own_address(address, port)
                else:
                    probe_node_0(address, port, connect_store)
                problem = ""
            except OSError as error:
                problem = error.strerror or str(error)
                time.sleep(RETRY_S)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    if problem:
        raise InputError(
            f"MASTER_ADDR={address}, MASTER_PORT={port}: {problem}. Set an address at which all nodes reach node 0, "
            "and a free port that no firewall blocks."
        )


def probe_own_address(address: str, port: int) -> None:
    """Connect to this machine at the address. Raise OSError."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6) as server:
        server.settimeout(1)
        try:
            with socket.create_connection((address, port), timeout=TIMEOUT_S):
                server.accept()[0].close()
        except (ConnectionRefusedError, TimeoutError):
            raise OSError(0, "this node is node 0 (NODE_RANK=0), and is not reached there") from None


def probe_node_0(address: str, port: int, connect_store: Callable[[], object]) -> None:
    """Connect to the store of node 0. Raise OSError."""
    try:
        socket.create_connection((address, port), timeout=TIMEOUT_S).close()
    except ConnectionRefusedError:
        print(f"waiting for node 0 at {address}, port {port}", flush=True)
        return
    try:
        connect_store()
    except RuntimeError:
        raise OSError(0, "another program answers there") from None
