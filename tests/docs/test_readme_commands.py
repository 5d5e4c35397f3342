"""The commands of the README, run as they stand there: quick start, and training on a data set like COCO."""

import functools
import hashlib
import http.server
import json
import re
import shutil
import threading
import zipfile

import pytest
import torch
from PIL import Image
from torchvision.models import resnet34

from paths import ROOT
from script_clone import replace_environment, run_command

pytestmark = pytest.mark.slow

BLOCKS = re.findall(r"^```console\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
QUICK_START, COCO = (
    [line.split("#")[0].strip("$ ") for line in block.splitlines() if "BENCHMARK=retinanet" not in line]
    for block in BLOCKS[:2]
)
FAKE_IMAGES = {"train": 920, "val": 4}
"""More training images than the global batch of config_DGXA100.sh."""
SMALL = "--device cpu --precision fp32 --batch-size 1 --num-workers 0 --max-steps 1 --warmup-steps 1"


def run(command, folder, **environ):
    process = run_command(command, folder, timeout_s=1800, **environ)
    return process.returncode, process.stdout + process.stderr


@pytest.fixture
def clone(tmp_path):
    """Clone of the committed state, made by the README's first command."""
    status, output = run(QUICK_START[0].replace("URL", str(ROOT)), tmp_path)
    assert status == 0, output
    replace_environment(tmp_path / "detection")
    return tmp_path / "detection"


def test_quick_start_reaches_the_target_and_runs_the_tests(clone, tmp_path):
    train, test = QUICK_START[1:]
    status, output = run(train, clone)
    assert status == 0, output
    assert "target reached" in output
    assert "MLPerf compliance (1.1.0): PASS" in output
    (tmp_path / "bats").write_text("#!/bin/sh\n")
    (tmp_path / "bats").chmod(0o755)
    # The same command with one test file, and without those of the scripts.
    path = f"export PATH={tmp_path}:$PATH"
    status, output = run(f"{path}; {test}", clone, PYTEST_ADDOPTS="tests/test_boxes.py")
    assert status == 0, output
    assert re.search(r"\d+ passed", output)


@pytest.fixture
def mirror(tmp_path):
    """Server with archives like COCO's and with random weights of ResNet-34. Returns variables that name it."""
    folder = tmp_path / "mirror"
    (folder / "zips").mkdir(parents=True)
    (folder / "annotations").mkdir()
    Image.new("RGB", (64, 48), "gray").save(tmp_path / "image.jpg")
    for split, count in FAKE_IMAGES.items():
        with zipfile.ZipFile(folder / f"zips/{split}2017.zip", "w") as archive:
            for number in range(count):
                archive.write(tmp_path / "image.jpg", f"{split}2017/{number}.jpg")
    with zipfile.ZipFile(folder / "annotations/annotations_trainval2017.zip", "w") as archive:
        for split, count in FAKE_IMAGES.items():
            archive.writestr(f"annotations/instances_{split}2017.json", json.dumps(fake_annotations(count)))
    torch.save(resnet34().state_dict(), folder / "weights")
    weights = f"resnet34-{hashlib.sha256((folder / 'weights').read_bytes()).hexdigest()[:8]}.pth"
    (folder / "weights").rename(folder / weights)
    archives = ("annotations/annotations_trainval2017.zip", "zips/train2017.zip", "zips/val2017.zip")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        yield {
            "COCO_URL": url,
            "COCO_MD5": " ".join(hashlib.md5((folder / name).read_bytes()).hexdigest() for name in archives),
            "COCO_TRAIN_IMAGES": str(FAKE_IMAGES["train"]),
            "COCO_VAL_IMAGES": str(FAKE_IMAGES["val"]),
            "BACKBONE_URL": f"{url}/{weights}",
        }
        server.shutdown()


def fake_annotations(count):
    """Return annotations of gray images, one of them without a box, with as many categories as COCO."""
    size = {"width": 64, "height": 48}
    box = {"bbox": [8, 8, 32, 24], "area": 768, "iscrowd": 0, "segmentation": [[8, 8, 40, 8, 40, 32, 8, 32]]}
    return {
        "images": [{"id": number + 1, "file_name": f"{number}.jpg", **size} for number in range(count)],
        "annotations": [
            {"id": number, "image_id": number, "category_id": number % 80 + 1, **box} for number in range(1, count)
        ],
        "categories": [{"id": number, "name": f"category {number}"} for number in range(1, 81)],
    }


def test_training_on_coco_runs_from_the_download_to_the_checkers(clone, mirror, tmp_path):
    download, backbone, dry_run, train, check = [line.replace("/data/coco", str(tmp_path / "coco")) for line in COCO]
    for command in (download, backbone):
        status, output = run(command, clone, **mirror)
        assert status == 0, output
    (weights,) = (clone / "data").glob("resnet34-*.pth")
    config = clone / "config_DGXA100.sh"
    config.write_text(re.sub(r"resnet34-\w+\.pth", weights.name, config.read_text()))

    status, output = run(dry_run, clone, DGXNGPU="8")
    assert status == 0, output
    assert f"train: {FAKE_IMAGES['train']} images (1 without boxes" in output
    status, output = run(f"{train} {SMALL}", clone)  # one step, since this machine has no eight accelerators
    assert status == 0, output
    log = next((clone / "results/DGXA100/ssd").glob("*/result_0.txt")).read_text()
    assert re.search(rf'"eval_samples", "value": {FAKE_IMAGES["val"] - 1},', log), "as the reference in closed"
    status, output = run(check, clone)
    assert status == 1, output
    assert "no score: 1 of 1 runs did not reach the target" in output
    shutil.rmtree(tmp_path / "coco")
