"""Addresses of node 0 that are wrong, silent or right, on loopback."""

import socket
import threading

import pytest

from detection.runtime import master_address
from mlperf.errors import InputError


@pytest.fixture(autouse=True)
def short_timeout(monkeypatch):
    monkeypatch.setattr(master_address, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(master_address, "RETRY_S", 0.05)


@pytest.fixture
def server():
    """Server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def check(address, port, node_rank, connect_store=lambda: None):
    master_address.check(address, port, node_rank, connect_store)


@pytest.mark.parametrize("node_rank", [0, 1])
def test_unknown_name_is_reported(node_rank):
    with pytest.raises(InputError, match=r"^MASTER_ADDR=nowhere.invalid, MASTER_PORT=\d+: [A-Z]"):
        check("nowhere.invalid", free_port(), node_rank)


@pytest.mark.parametrize("node_rank", [0, 1])
def test_name_server_that_does_not_answer_is_reported(monkeypatch, node_rank):
    def wait(*_, **__):
        threading.Event().wait(1)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", wait)
    with pytest.raises(InputError, match=r"MASTER_ADDR=somewhere, MASTER_PORT=\d+: no answer"):
        check("somewhere", free_port(), node_rank)


def test_server_that_does_not_answer_is_reported(server):
    with pytest.raises(InputError, match=f"MASTER_PORT={server.getsockname()[1]}: no answer"):
        check("127.0.0.1", server.getsockname()[1], 1, lambda: threading.Event().wait(10))


def test_another_program_is_reported(server):
    def reject():
        raise RuntimeError("Ping failed, invalid value returned from server")

    with pytest.raises(InputError, match="another program answers there"):
        check("127.0.0.1", server.getsockname()[1], 1, reject)


def test_port_in_use_is_reported(server):
    with pytest.raises(InputError, match="Address already in use"):
        check("127.0.0.1", server.getsockname()[1], 0)


def test_address_of_another_machine_is_reported_on_node_0(monkeypatch, server):
    connect, elsewhere = socket.create_connection, server.getsockname()
    monkeypatch.setattr(socket, "create_connection", lambda _, timeout: connect(elsewhere, timeout=timeout))
    monkeypatch.setattr(master_address, "TIMEOUT_S", 2)
    with pytest.raises(InputError, match=r"this node is node 0 \(NODE_RANK=0\), and is not reached there"):
        check("10.0.0.1", free_port(), 0)


def test_right_addresses_pass(server, capsys):
    check("localhost", free_port(), 0)
    check("127.0.0.1", server.getsockname()[1], 1)
    assert capsys.readouterr().out == ""
    port = free_port()
    check("127.0.0.1", port, 1)
    assert capsys.readouterr().out == f"waiting for node 0 at 127.0.0.1, port {port}\n"
