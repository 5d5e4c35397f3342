import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from annotation_file import contents, digests
from detection.data import coco
from detection.synthetic import toy
from paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools

SMALL = toy.Drawing(train_images=40, val_images=6, seed=3)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "data"
    assert toy.draw(folder, SMALL)
    return folder


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["toy", *map(str, arguments)])
    return toy._main()


def test_the_same_seed_draws_the_same_bytes_and_another_seed_others(drawn: Path, tmp_path: Path) -> None:
    toy.draw(tmp_path / "again", SMALL)
    toy.draw(tmp_path / "other", toy.Drawing(SMALL.train_images, SMALL.val_images, seed=4))
    assert digests(tmp_path / "again") == digests(drawn)
    other = digests(tmp_path / "other")
    assert not set(other.values()) & set(digests(drawn).values())


def test_no_picture_is_drawn_twice(drawn: Path) -> None:
    assert len(set(digests(drawn).values())) == SMALL.train_images + SMALL.val_images + 2


def test_the_drawing_reads_as_coco_with_nothing_dropped_or_clipped(drawn: Path) -> None:
    for name, num_images in (("train", SMALL.train_images), ("val", SMALL.val_images)):
        split = coco.read(*coco.layout(drawn, name))  # type: ignore[arg-type]
        assert len(split) == num_images
        assert [category.name for category in split.categories] == ["disc", "square", "triangle"]
        assert (split.dropped_boxes, split.clipped_boxes, split.missing_images) == (0, 0, 0)
    train_ids = {image["id"] for image in contents(drawn, "train")["images"]}
    assert not train_ids & {image["id"] for image in contents(drawn, "val")["images"]}


def test_some_images_have_no_boxes_and_some_have_crowds(drawn: Path) -> None:
    train = coco.read(*coco.layout(drawn, "train"))
    assert len(train) - len(train.with_boxes()) == 2
    assert train.crowd.sum() == 1


def test_even_one_picture_is_enough_for_a_crowd_and_a_box(tmp_path: Path) -> None:
    toy.draw(tmp_path, toy.Drawing(train_images=1, val_images=1))
    val = coco.read(*coco.layout(tmp_path, "val"))
    assert set(val.crowd) == {True, False}


def test_pictures_are_jpegs_of_the_size_that_the_annotations_say(drawn: Path) -> None:
    sizes = set()
    for image in contents(drawn, "train")["images"]:
        assert image["file_name"] == f"{image['id']:012}.jpg"
        with Image.open(drawn / "train2017" / image["file_name"]) as picture:
            assert (picture.format, picture.mode) == ("JPEG", "RGB")
            assert picture.size == (image["width"], image["height"])
            assert 240 <= min(picture.size) <= max(picture.size) <= 400
            sizes.add(picture.size)
    assert len(sizes) > 20
    assert {width > height for width, height in sizes} == {True, False}


def test_boxes_are_the_extent_of_the_polygons_and_areas_are_true(drawn: Path) -> None:
    images = {image["id"]: image for image in contents(drawn, "train")["images"]}
    for row in contents(drawn, "train")["annotations"]:
        if row["iscrowd"]:
            continue
        (flat,) = row["segmentation"]
        polygon = np.array(flat).reshape(-1, 2)
        low, high = polygon.min(axis=0), polygon.max(axis=0)
        assert row["bbox"] == pytest.approx([*low, *(high - low)], abs=0.006)
        image = images[row["image_id"]]
        (encoded,) = rle.frPyObjects([flat], image["height"], image["width"])
        pixels = float(rle.area(encoded))
        assert row["area"] == pytest.approx(pixels, rel=0.05, abs=20)


@pytest.mark.parametrize("shape", toy.SHAPES, ids=lambda shape: shape.name)
def test_a_shape_covers_the_pixels_of_its_polygon_and_no_others(shape: toy.Shape) -> None:
    rng = np.random.default_rng(0)
    shifts = []
    for _ in range(50):
        polygon = (toy._outline(rng, shape) + 1) * rng.uniform(30, 150) + rng.uniform(0, 1, size=2)
        alpha, (rows, columns) = toy._stencil(polygon)
        assert alpha.sum() == pytest.approx(toy._area(polygon), rel=0.03)
        covered = np.flatnonzero((alpha > 0).any(axis=1)) + rows.start
        assert abs(covered[0] - polygon[:, 1].min()) <= 1.01
        assert abs(covered[-1] + 1 - polygon[:, 1].max()) <= 1.01
        weight = alpha.sum(axis=0) / alpha.sum()
        shifts.append(weight @ (np.arange(columns.start, columns.stop) + 0.5) - _centroid_x(polygon))
    assert abs(np.mean(shifts)) < 0.04  # pixels; half a pixel of the large stencil would be 0.125


def _centroid_x(polygon: np.ndarray) -> float:
    x, y = polygon.T
    cross = x * np.roll(y, -1) - np.roll(x, -1) * y
    return float(((x + np.roll(x, -1)) * cross).sum() / (3 * cross.sum()))


def test_crowds_are_run_lengths_of_the_mask_with_its_tight_box(drawn: Path) -> None:
    (row,) = (row for row in contents(drawn, "val")["annotations"] if row["iscrowd"])
    counts, (height, width) = row["segmentation"]["counts"], row["segmentation"]["size"]
    encoded = rle.frPyObjects(row["segmentation"], height, width)
    assert sum(counts) == height * width
    assert all(count > 0 for count in counts[1:])
    assert row["area"] == rle.area(encoded)
    assert row["bbox"] == rle.toBbox(encoded).tolist()


def test_polygons_lie_where_the_colour_of_their_category_is(drawn: Path) -> None:
    for row in contents(drawn, "train")["annotations"]:
        if row["iscrowd"]:
            continue
        path = drawn / "train2017" / f"{row['image_id']:012}.jpg"
        pixels = np.asarray(Image.open(path).convert("HSV"), dtype=float)
        (encoded,) = rle.frPyObjects(row["segmentation"], *pixels.shape[:2])
        inside = rle.decode(encoded).astype(bool)
        angle = pixels[inside, 0] * (2 * np.pi / 256)
        hue = np.arctan2(np.sin(angle).mean(), np.cos(angle).mean()) / (2 * np.pi)
        shape = next(shape for shape in toy.SHAPES if shape.id == row["category_id"])
        assert abs((hue - shape.hue + 0.5) % 1 - 0.5) < 0.1
        assert pixels[inside, 1].mean() > 80


def test_shapes_do_not_cover_each_other(drawn: Path) -> None:
    for image in contents(drawn, "train")["images"]:
        covered = np.zeros((image["height"], image["width"]), dtype=int)
        for row in contents(drawn, "train")["annotations"]:
            if row["image_id"] == image["id"]:
                polygons = row["segmentation"]
                encoded = rle.frPyObjects(polygons, image["height"], image["width"])
                covered += rle.decode(encoded if row["iscrowd"] else encoded[0])
        assert covered.max() <= 1


def test_info_says_that_it_is_drawn_and_from_what(drawn: Path) -> None:
    data = contents(drawn, "val")
    assert "not COCO" in data["info"]["description"]
    assert (data["info"]["train_images"], data["info"]["val_images"], data["info"]["seed"]) == (40, 6, 3)
    assert data["licenses"][0]["id"] == data["images"][0]["license"]


def test_a_second_call_finds_the_drawing_and_writes_nothing(tmp_path: Path) -> None:
    drawing = toy.Drawing(train_images=2, val_images=1)
    assert toy.draw(tmp_path, drawing)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert not toy.draw(tmp_path, drawing)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_other_parameters_draw_again(tmp_path: Path) -> None:
    toy.draw(tmp_path, toy.Drawing(train_images=3, val_images=1))
    assert toy.draw(tmp_path, toy.Drawing(train_images=2, val_images=1, seed=1))
    assert len(list((tmp_path / "train2017").iterdir())) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(toy.PARTS)


def test_a_drawing_that_lost_a_picture_is_drawn_again(tmp_path: Path) -> None:
    drawing = toy.Drawing(train_images=2, val_images=1)
    toy.draw(tmp_path, drawing)
    expected = digests(tmp_path)
    (tmp_path / "train2017" / "000000000001.jpg").unlink()
    assert toy.draw(tmp_path, drawing)
    assert digests(tmp_path) == expected


@pytest.mark.parametrize("foreign", ["notes.txt", "train2017/000000000001.jpg", "annotations/instances_train2017.json"])
def test_a_folder_with_other_content_is_refused_and_left_alone(
    tmp_path: Path, foreign: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / foreign
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"info": {"description": "COCO 2017 Dataset"}}')
    assert run_main(monkeypatch, tmp_path, "--train-images", 2, "--val-images", 1) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds something other than drawn pictures")
    assert list(digests(tmp_path)) == [foreign]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert run_main(monkeypatch, tmp_path / "file") == 2
    assert run_main(monkeypatch, tmp_path / "file" / "below") == 2


@pytest.mark.parametrize("flags", [["--train-images", "0"], ["--val-images", "-1"], ["--seed", "-1"], ["--sed", "1"]])
def test_a_wrong_flag_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, tmp_path / "data", *flags)
    assert stop.value.code == 2
    assert not (tmp_path / "data").exists()


def test_a_killed_drawing_is_never_taken_for_done(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    command = [sys.executable, "-m", "detection.synthetic.toy", folder, "--train-images", "100000"]
    with subprocess.Popen(command, cwd=ROOT) as process:
        deadline = time.monotonic() + 30
        while not list(folder.glob(f"{toy.SCRATCH}*/fresh/train2017/*.jpg")) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not any((folder / part).exists() for part in toy.PARTS)
    assert toy.draw(folder, toy.Drawing(train_images=2, val_images=1))
    assert len(coco.read(*coco.layout(folder, "train"))) == 2


def test_the_command_says_what_it_drew_and_then_that_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (tmp_path / "data", "--train-images", 2, "--val-images", 1)
    assert run_main(monkeypatch, *arguments) == 0
    assert "drew 2 + 1 pictures (seed 0)" in capsys.readouterr().out
    assert run_main(monkeypatch, *arguments) == 0
    assert "has 2 + 1 pictures (seed 0) already" in capsys.readouterr().out
