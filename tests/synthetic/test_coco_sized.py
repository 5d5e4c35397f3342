import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from annotation_file import contents, digests
from detection.config.settings import InputError
from detection.data import coco
from detection.evaluation.coco_metric import BoxMetric
from detection.synthetic import coco_scenes, coco_sized
from detection.synthetic.coco_sized import Drawing
from paths import ROOT, shared
from ssd import preflight

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools

SMALL = Drawing(images=40, seed=3)
COMMAND = [sys.executable, "-m", "detection.synthetic.coco_sized"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic_coco") / "data"
    assert coco_sized.draw(folder, SMALL, workers=1)
    return folder


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["synthetic_coco", *map(str, arguments)])
    return coco_sized._main()


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] == "Z"
    except FileNotFoundError:
        return True


def test_two_processes_draw_the_same_bytes_as_one_and_another_seed_others(drawn: Path, tmp_path: Path) -> None:
    coco_sized.draw(tmp_path / "two", SMALL, workers=2)
    assert digests(tmp_path / "two") == digests(drawn)
    coco_sized.draw(tmp_path / "other", Drawing(images=2, seed=4), workers=1)
    assert not set(digests(tmp_path / "other").values()) & set(digests(drawn).values())


def test_no_picture_is_drawn_twice(drawn: Path) -> None:
    pictures = [digest for name, digest in digests(drawn).items() if name.endswith(".jpg")]
    assert len(pictures) == len(set(pictures)) == 40 + 50


def test_a_drawing_that_is_killed_leaves_no_process_and_is_gone_on_with_to_the_same_bytes(tmp_path: Path) -> None:
    drawing, killed, whole = Drawing(images=150), tmp_path / "killed", tmp_path / "whole"
    with subprocess.Popen([*COMMAND, killed, "--images", "150", "--workers", "2"], cwd=ROOT) as process:
        deadline = time.monotonic() + 60
        while len(list(killed.glob("train2017/0*.jpg"))) < 5 and time.monotonic() < deadline:
            time.sleep(0.002)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(children) >= 2
    while not all(has_ended(int(child)) for child in children):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.01)
    before = digests(killed)
    assert sum(name.endswith(".jpg") for name in before) < 150 + 50
    assert not list(killed.glob("annotations/*.json"))
    assert not coco_sized.is_complete(killed, drawing)

    (killed / "train2017/000000000001.jpg").write_bytes(b"")  # as a loss of power leaves it
    (killed / "val2017/.drawing-1").write_bytes(b"half")
    assert coco_sized.draw(killed, drawing)
    coco_sized.draw(whole, drawing)
    assert digests(killed) == digests(whole)


def test_a_larger_drawing_goes_on_from_a_smaller_and_keeps_its_pictures(drawn: Path, tmp_path: Path) -> None:
    folder, larger = tmp_path / "grown", Drawing(images=60, seed=3)
    shutil.copytree(drawn, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}
    assert coco_sized.draw(folder, larger)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    coco_sized.draw(tmp_path / "at once", larger)
    assert digests(folder) == digests(tmp_path / "at once")

    assert coco_sized.draw(folder, SMALL)
    assert contents(folder, "train") == contents(drawn, "train")
    assert len(list(folder.glob("train2017/*"))) == 60


def test_annotations_are_away_while_others_are_drawn(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(drawn, folder)

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(coco_sized, "_draw_split", fail)
    with pytest.raises(OSError, match="No space"):
        coco_sized.draw(folder, Drawing(images=41, seed=3))
    assert not list((folder / "annotations").iterdir())
    assert not coco_sized.is_complete(folder, SMALL)


def test_shrunken_annotations_of_an_earlier_drawing_are_not_read_for_the_new(drawn: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(drawn, folder)
    shrunken = folder / "annotations/bbox_only_instances_train2017.json"
    shutil.copy(folder / "annotations/instances_train2017.json", shrunken)
    coco_sized.draw(folder, Drawing(images=41, seed=3))
    assert not shrunken.exists()


def test_a_second_call_finds_the_drawing_and_writes_nothing(drawn: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}
    assert not coco_sized.draw(drawn, SMALL)
    assert {path: path.stat().st_mtime_ns for path in drawn.rglob("*")} == before


def test_a_drawing_that_lost_a_picture_gets_it_back(drawn: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(drawn, folder)
    (folder / coco_sized.MARKER).unlink()  # which a copy with * leaves out
    (folder / "val2017/000000000002.jpg").unlink()
    assert coco_sized.draw(folder, SMALL)
    assert digests(folder) == digests(drawn)


def test_two_calls_at_once_draw_once(tmp_path: Path) -> None:
    command = [*COMMAND, tmp_path, "--images", "100", "--workers", "1"]
    calls = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [call.communicate()[0] for call in calls]
    assert [call.returncode for call in calls] == [0, 0]
    assert sorted("drew" in line for line in said) == [False, True]
    assert not list(tmp_path.glob(f"*/{coco_sized.toy.SCRATCH}*"))


@pytest.mark.parametrize(
    "foreign", ["notes.txt", "train2017/000000000001.jpg", "annotations/instances_train2017.json", "file"]
)
def test_a_folder_with_other_content_is_refused_and_left_alone(
    tmp_path: Path, foreign: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / foreign
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"info": {"description": "COCO 2017 Dataset"}}')
    folder = file if foreign == "file" else tmp_path
    assert run_main(monkeypatch, folder, "--images", 2) == 2
    assert capsys.readouterr().err.startswith(f"error: {folder} holds something other than pictures of a rehearsal")
    assert list(digests(tmp_path)) == [foreign]


def test_coco_in_the_place_of_a_rehearsal_is_refused_and_left_alone(drawn: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(drawn, folder)
    annotations = folder / "annotations/instances_val2017.json"
    annotations.write_text('{"info": {"description": "COCO 2017 Dataset", "contributor": "COCO Consortium"}}')
    before = digests(folder)
    with pytest.raises(InputError, match="something other"):
        coco_sized.draw(folder, SMALL)
    assert digests(folder) == before


def test_pictures_of_another_seed_are_not_thrown_away(drawn: Path) -> None:
    before = digests(drawn)
    with pytest.raises(InputError, match="a rehearsal of seed 3, version 1, not of seed 4"):
        coco_sized.draw(drawn, Drawing(images=40, seed=4))
    assert digests(drawn) == before


def test_a_disk_without_room_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(coco_sized.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**7, 10**7))
    assert run_main(monkeypatch, tmp_path / "new", "--images", 100) == 2
    message = capsys.readouterr().err
    assert "0.03 GB are needed for 150 pictures" in message
    assert "0.01 GB free" in message
    assert not (tmp_path / "new").exists()


def test_the_room_that_is_asked_for_is_what_is_taken(drawn: Path) -> None:
    taken = sum(path.stat().st_size for path in drawn.rglob("*") if path.is_file())
    assert taken == pytest.approx(90 * (coco_sized.PICTURE_BYTES + coco_sized.ROWS_BYTES), rel=0.2)


def test_what_is_drawn_already_needs_no_room(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    shutil.copytree(drawn, folder)
    (folder / "train2017/000000000001.jpg").unlink()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(coco_sized.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    assert coco_sized.draw(folder, SMALL)


@pytest.mark.parametrize("flags", [["--images", "0"], ["--workers", "-1"], ["--seed", "-1"], ["--sed", "1"]])
def test_a_wrong_flag_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, tmp_path / "data", *flags)
    assert stop.value.code == 2
    assert not (tmp_path / "data").exists()


def test_the_drawing_reads_as_coco_with_nothing_dropped_or_clipped(drawn: Path) -> None:
    for name, num_images in SMALL.counts().items():
        split = coco.read(*coco.layout(drawn, name))  # type: ignore[arg-type]
        assert len(split) == num_images
        assert split.num_classes == 81
        assert (split.dropped_boxes, split.clipped_boxes, split.missing_images) == (0, 0, 0)
    train_ids = {image["id"] for image in contents(drawn, "train")["images"]}
    assert not train_ids & {image["id"] for image in contents(drawn, "val")["images"]}


def test_categories_are_those_of_coco() -> None:
    ids = [category.id for category in coco_scenes.COCO]
    assert len(ids) == len({category.name for category in coco_scenes.COCO}) == 80
    assert set(range(1, 91)) - set(ids) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert sum(category.boxes for category in coco_scenes.COCO) == 860_001


def test_categories_and_keys_are_those_of_a_sample_of_coco(drawn: Path) -> None:
    ours, theirs = (
        contents(drawn, "train"),
        json.loads(shared("data/coco-tiny/annotations/instances_train2017.json").read_text()),
    )
    assert ours["categories"] == theirs["categories"]
    for part in ("images", "annotations"):
        assert ours[part][0].keys() == theirs[part][0].keys()


def test_as_many_images_are_without_boxes_as_in_coco() -> None:
    for split, (some, of) in coco_scenes.WITHOUT_BOXES.items():
        assert sum(coco_scenes.is_empty(split, index) for index in range(of)) == some
        assert any(coco_scenes.is_empty(split, index) for index in range(40))


@pytest.mark.slow
def test_boxes_are_distributed_like_those_of_coco(tmp_path: Path) -> None:
    coco_sized.draw(tmp_path, Drawing(images=12_000), pictures=False)
    assert not list(tmp_path.glob("*/*.jpg"))
    train = contents(tmp_path, "train")
    rows = train["annotations"]
    boxes = np.unique([row["image_id"] for row in rows], return_counts=True)[1]
    assert len(train["images"]) - len(boxes) == pytest.approx(12_000 * 1021 / 118_287, abs=1)
    assert boxes.mean() == pytest.approx(860_001 / 117_266, rel=0.02)
    assert np.median(boxes) in (4, 5)
    assert np.percentile(boxes, 99) == pytest.approx(34, abs=3)
    assert 70 <= boxes.max() <= 93

    crowd = np.array([row["iscrowd"] for row in rows], dtype=bool)
    assert crowd.mean() == pytest.approx(10_052 / 860_001, rel=0.15)
    areas = np.array([row["area"] for row in rows])[~crowd]
    assert (areas < 32**2).mean() == pytest.approx(0.41, abs=0.02)
    assert (areas > 96**2).mean() == pytest.approx(0.24, abs=0.02)

    counts = np.bincount([row["category_id"] for row in rows])[[category.id for category in coco_scenes.COCO]]
    assert counts[0] / len(rows) == pytest.approx(262_465 / 860_001, abs=0.02)
    boxes_in_coco = [category.boxes for category in coco_scenes.COCO]
    assert np.corrcoef(np.log(counts), np.log(boxes_in_coco))[0, 1] > 0.97
    different = len({(row["image_id"], row["category_id"]) for row in rows}) / len(boxes)
    assert different == pytest.approx(2.9, abs=0.25)

    pixels = np.array([image["width"] * image["height"] for image in train["images"]])
    assert pixels.mean() == pytest.approx(270_000, rel=0.03)
    middle = (pixels > 167_500) & (pixels < 355_840)
    assert middle.mean() == pytest.approx(0.9, abs=0.06)
    corners = [sum(map(len, row["segmentation"])) / 2 for row in rows if not row["iscrowd"]]
    assert np.mean(corners) == pytest.approx(21.5, abs=2)


def test_pictures_are_jpegs_as_coco_has_them(drawn: Path) -> None:
    lengths = []
    for image in contents(drawn, "train")["images"]:
        path = drawn / "train2017" / image["file_name"]
        assert image["file_name"] == f"{image['id']:012}.jpg"
        with Image.open(path) as picture:
            assert picture.size == (image["width"], image["height"])
            assert picture.format == "JPEG"
            assert "progressive" not in picture.info
            channels = {"RGB": 3, "L": 1}[picture.mode]
            assert [layer[1:3] for layer in picture.layer] == [(1, 1)] * channels  # type: ignore[attr-defined]
        lengths.append(path.stat().st_size)
    assert 112_000 < np.mean(lengths) < 205_000
    assert 45_000 < np.std(lengths) < 110_000
    assert min(lengths) < 90_000
    assert max(lengths) > 250_000


def test_a_grey_picture_has_one_channel() -> None:
    shard = next(s for s in range(100) if coco_scenes.plan(SMALL.seed, "train", s).grey.any())
    plan = coco_scenes.plan(SMALL.seed, "train", shard)
    encoded = coco_scenes.picture(plan, int(plan.grey.argmax()))
    with Image.open(io.BytesIO(encoded)) as picture:
        assert picture.mode == "L"


def test_boxes_are_the_extent_of_the_polygons_and_areas_are_true(drawn: Path) -> None:
    images = {image["id"]: image for image in contents(drawn, "val")["images"]}
    for row in contents(drawn, "val")["annotations"]:
        if row["iscrowd"]:
            continue
        (flat,) = row["segmentation"]
        polygon = np.array(flat).reshape(-1, 2)
        low, high = polygon.min(axis=0), polygon.max(axis=0)
        assert row["bbox"] == pytest.approx([*low, *(high - low)], abs=0.006)
        image = images[row["image_id"]]
        (encoded,) = rle.frPyObjects([flat], image["height"], image["width"])
        pixels = float(rle.area(encoded))
        assert row["area"] == pytest.approx(pixels, rel=0.1, abs=20)


def test_crowds_are_run_lengths_of_the_mask_with_its_tight_box(tmp_path: Path) -> None:
    coco_sized.draw(tmp_path, Drawing(images=200), pictures=False)
    crowds = [row for row in contents(tmp_path, "train")["annotations"] if row["iscrowd"]]
    assert len(crowds) > 5
    for row in crowds:
        counts, (height, width) = row["segmentation"]["counts"], row["segmentation"]["size"]
        encoded = rle.frPyObjects(row["segmentation"], height, width)
        assert sum(counts) == height * width
        assert row["area"] == rle.area(encoded)
        assert row["bbox"] == rle.toBbox(encoded).tolist()


def test_the_smallest_shape_of_a_picture_has_its_category_s_colour(drawn: Path) -> None:
    labels = {category.id: label for label, category in enumerate(coco_scenes.COCO)}
    rows = [row for row in contents(drawn, "train")["annotations"] if not row["iscrowd"]]
    smallest = {row["image_id"]: row for row in sorted(rows, key=lambda row: -row["area"])}
    seen = 0
    for row in smallest.values():
        if row["area"] < 15**2:
            continue
        seen += 1
        pixels = np.asarray(Image.open(drawn / "train2017" / f"{row['image_id']:012}.jpg"), dtype=float)
        left, top, width, height = row["bbox"]
        x, y = round(left + width / 2), round(top + height / 2)
        middle = pixels[y - 2 : y + 3, x - 2 : x + 3].mean(axis=(0, 1))
        assert middle == pytest.approx(coco_scenes.palette()[labels[row["category_id"]], 1].clip(48, 207), abs=30)
    assert seen > 10


def test_both_metrics_find_the_truth_in_the_truth(drawn: Path) -> None:
    rows = np.array(
        [
            [row["image_id"], *row["bbox"], 1.0, row["category_id"]]
            for row in contents(drawn, "val")["annotations"]
            if not row["iscrowd"]
        ]
    )
    annotation_file, _ = coco.layout(drawn, "val")
    figures = BoxMetric(annotation_file, "pycocotools")(rows)
    assert figures["AP"] > 0.99
    assert BoxMetric(annotation_file, "hotcoco")(rows) == figures


def test_preflight_draws_as_many_as_the_environment_says_and_a_dry_run_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith(("SSD_", "DGX"))]:
        monkeypatch.delenv(name)
    for name in ("RUN_DIR", "NODE_RANK", "RUN_INDEX", "PAGE_CACHE_DROPPED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOGDIR", str(tmp_path / "results"))
    monkeypatch.setenv("DATADIR", str(tmp_path / "data"))
    monkeypatch.setenv("SYNTHETIC_IMAGES", "12")
    recipe = ["--dataset", "synthetic_coco", "--division", "open", "--batch-size", "4"]
    assert preflight.main([*recipe, "--dry-run"]) == 0
    assert "the pictures are drawn when the run starts" in capsys.readouterr().out
    assert not (tmp_path / "data").exists()
    assert preflight.main(recipe) == 0
    assert "train: 12 images" in capsys.readouterr().err
    assert preflight.main([*recipe, "--synthetic-images", "13"]) == 0
    assert "train: 13 images" in capsys.readouterr().err
