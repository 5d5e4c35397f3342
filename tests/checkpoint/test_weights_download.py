"""Downloads of public weights from a mirror on loopback."""

import fcntl
import hashlib
import os

import numpy as np
import pytest
import torch
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights, RetinaNet_ResNet50_FPN_Weights

import http_mirror
from detection.checkpoint import weights_download
from detection.checkpoint.public_weights import PUBLIC_WEIGHTS, SOURCE_URL
from paths import ROOT

CONTENT = bytes(range(256)) * 400
NAME = f"tiny-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


@pytest.fixture
def server(monkeypatch):
    with http_mirror.serve(monkeypatch) as server:
        server.files[f"/{NAME}"] = CONTENT
        yield server


@pytest.fixture
def get(server, tmp_path, monkeypatch, capsys):
    """Run the command with names relative to the mirror, and return its status, output and errors."""
    monkeypatch.setitem(PUBLIC_WEIGHTS, "tiny", PUBLIC_WEIGHTS["resnet18"]._replace(file=NAME))

    def run(*arguments):
        status = weights_download.main([*arguments, str(tmp_path / "weights"), "--source-url", server.url])
        return status, *capsys.readouterr()

    return run


def test_file_appears_under_its_name_and_is_fetched_once(get, server, tmp_path):
    status, out, _ = get("tiny")
    assert status == 0
    assert out == f"downloading {server.url}/{NAME}\n{tmp_path}/weights/{NAME} is ready\n"
    assert (tmp_path / "weights" / NAME).read_bytes() == CONTENT
    assert os.listdir(tmp_path / "weights") == [NAME]
    server.requests.clear()
    assert get("tiny")[:2] == (0, f"{tmp_path}/weights/{NAME} already exists\n")
    assert server.requests == []


def test_download_continues_where_the_connection_broke(get, server, tmp_path):
    server.faults[f"/{NAME}"] = [{"cut": 60_000}]
    assert get("tiny")[0] == 0
    assert server.requests == [f"/{NAME}", f"/{NAME} bytes=60000-"]
    assert (tmp_path / "weights" / NAME).read_bytes() == CONTENT


def test_next_call_continues_an_interrupted_one(get, server, tmp_path):
    server.faults[f"/{NAME}"] = [{"cut": 60_000}, *[{"status": 503}] * 3]
    status, _, err = get("tiny")
    assert status == 1
    assert err.endswith("Run this again: it continues\n")
    assert os.listdir(tmp_path / "weights") == [f"{NAME}.part"]
    server.requests.clear()
    assert get("tiny")[0] == 0
    assert server.requests == [f"/{NAME} bytes=60000-"]


def test_file_with_a_wrong_checksum_is_removed(get, server, tmp_path):
    server.files[f"/{NAME}"] = CONTENT[:-1] + b"?"
    status, _, err = get("tiny")
    assert status == 1
    assert "the checksum of the downloaded file is wrong" in err
    assert os.listdir(tmp_path / "weights") == []


def test_damaged_file_with_the_final_name_is_reported(get, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / NAME).write_bytes(CONTENT[:1000])
    status, _, err = get("tiny")
    assert status == 2
    assert "its SHA-256 does not begin with" in err


def test_url_replaces_the_name(get, server, tmp_path):
    assert get(f"{server.url}/{NAME}")[0] == 0
    assert (tmp_path / "weights" / NAME).exists()
    status, _, err = get(f"{server.url}/tiny.pth")
    assert status == 2
    assert "the file name must end in the first 8 digits of its SHA-256" in err


def test_unknown_name_and_second_download_are_rejected(get, tmp_path):
    status, _, err = get("resnet35")
    assert status == 2
    assert "resnet35: no such weights. Choose one of resnet18, resnet34, " in err
    (tmp_path / "weights").mkdir()
    descriptor = os.open(tmp_path / "weights", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    status, _, err = get("tiny")
    os.close(descriptor)
    assert status == 2
    assert "another download is running there" in err


def test_npz_holds_every_tensor(get, server, tmp_path):
    torch.save({"conv1.weight": torch.arange(6.0).reshape(2, 3)}, tmp_path / "state")
    content = (tmp_path / "state").read_bytes()
    name = f"state-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    server.files[f"/{name}"] = content
    assert get("--npz", f"{server.url}/{name}")[0] == 0
    with np.load(tmp_path / "weights" / name.replace(".pth", ".npz")) as arrays:
        assert arrays["conv1.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_list_names_every_file(capsys):
    assert weights_download.main([]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert rows == list(PUBLIC_WEIGHTS)
    documented = (ROOT / "docs/CUSTOM_DATA.md").read_text()
    assert all(f"`{name}`" in documented for name in rows)


@pytest.mark.parametrize(
    ("name", "published"),
    [("maskrcnn", MaskRCNN_ResNet50_FPN_Weights.COCO_V1), ("retinanet", RetinaNet_ResNet50_FPN_Weights.COCO_V1)],
)
def test_detectors_are_those_that_torchvision_publishes(name, published):
    weights = PUBLIC_WEIGHTS[name]
    assert weights.url == published.url
    assert weights.url.startswith(SOURCE_URL)
    metrics = published.meta["_metrics"]["COCO-val2017"]
    assert [float(part.split()[-1]) for part in weights.metric.split(",")] == list(metrics.values())
