"""Page of a run in progress, requested over HTTP."""

import json
import threading
import urllib.error
import urllib.request

import pytest

from detection.report import server, watch
from paths import ROOT

TOY = ROOT / "perf" / "results" / "2026-11-21_toy_2core_cpu"
LINES = (TOY / "metrics.jsonl").read_text().splitlines(keepends=True)


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a run that has recorded its start and two steps."""
    (tmp_path / "config.json").write_text((TOY / "config.json").read_text())
    (tmp_path / "metrics.jsonl").write_text("".join(LINES[:3]))
    return tmp_path


@pytest.fixture
def address(folder):
    with server.make_server(folder, "127.0.0.1", 0) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()
        thread.join()


def get(address: str, **headers: str) -> tuple[int, str, str]:
    """Return status, entity tag and text of a page."""
    request = urllib.request.Request(address, headers={name.replace("_", "-"): text for name, text in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers["ETag"], response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, "", ""


def test_page_follows_the_run(folder, address):
    status, tag, page = get(address)
    assert status == 200
    assert '<html lang="en" data-live>' in page
    assert "In progress" in page
    assert "At step 20 of epoch 1 of at most 12" in page
    assert get(address, If_None_Match=tag)[0] == 304
    (folder / "metrics.jsonl").write_text("".join(LINES))
    status, new_tag, page = get(address, If_None_Match=tag)
    assert (status, new_tag != tag) == (200, True)
    assert "Target reached" in page
    assert "data-live" in page  # images and metrics by class are still to come
    (folder / "classes.json").write_text(json.dumps([{"name": "disc", "objects": 3, "AP": 0.5}]))
    assert "AP by class" in get(address, If_None_Match=new_tag)[2]


def test_run_without_records_is_waited_for_and_other_paths_do_not_exist(folder, address):
    (folder / "config.json").unlink()
    (folder / "metrics.jsonl").unlink()
    status, _, page = get(address)
    assert status == 200
    assert "has recorded nothing yet" in page
    assert 'http-equiv="refresh"' in page
    assert get(f"{address}config.json")[0] == 404


def test_occupied_port_is_named(folder, address, capsys):
    port = address.rstrip("/").rpartition(":")[2]
    assert watch.main([str(folder), "--serve", port]) == 2
    assert f"error: --serve {port}: 127.0.0.1 cannot be served" in capsys.readouterr().err
