import os
import shutil
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
from generated import check_crowd, check_polygons
from paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools

SMALL = toy.ToySpec(train_images=40, val_images=6, seed=3)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "data"
    assert toy.generate(folder, SMALL)
    return folder


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["toy", *map(str, arguments)])
    return toy._main()


def test_bytes_depend_on_the_seed(data_dir: Path, tmp_path: Path) -> None:
    toy.generate(tmp_path / "again", SMALL)
    toy.generate(tmp_path / "other", toy.ToySpec(SMALL.train_images, SMALL.val_images, seed=4))
    assert digests(tmp_path / "again") == digests(data_dir)
    other = digests(tmp_path / "other")
    assert not set(other.values()) & set(digests(data_dir).values())


def test_all_images_differ(data_dir: Path) -> None:
    assert len(set(digests(data_dir).values())) == SMALL.train_images + SMALL.val_images + 2


def test_data_set_reads_as_coco_with_nothing_dropped_or_clipped(data_dir: Path) -> None:
    for name, num_images in (("train", SMALL.train_images), ("val", SMALL.val_images)):
        split = coco.read(*coco.standard_paths(data_dir, name))  # type: ignore[arg-type]
        assert len(split) == num_images
        assert [category.name for category in split.categories] == ["disc", "square", "triangle"]
        assert (split.num_dropped_boxes, split.num_clipped_boxes, split.num_missing_images) == (0, 0, 0)
    train_ids = {image["id"] for image in contents(data_dir, "train")["images"]}
    assert not train_ids & {image["id"] for image in contents(data_dir, "val")["images"]}


def test_some_images_have_no_boxes_and_some_have_crowds(data_dir: Path) -> None:
    train = coco.read(*coco.standard_paths(data_dir, "train"))
    assert len(train) - len(train.drop_empty_images()) == 2
    assert train.is_crowd.sum() == 1


def test_single_image_has_a_crowd_and_a_box(tmp_path: Path) -> None:
    toy.generate(tmp_path, toy.ToySpec(train_images=1, val_images=1))
    val = coco.read(*coco.standard_paths(tmp_path, "val"))
    assert set(val.is_crowd) == {True, False}


def test_images_are_jpegs_of_the_annotated_size(data_dir: Path) -> None:
    sizes = set()
    for image in contents(data_dir, "train")["images"]:
        assert image["file_name"] == f"{image['id']:012}.jpg"
        with Image.open(data_dir / "train2017" / image["file_name"]) as opened:
            assert (opened.format, opened.mode) == ("JPEG", "RGB")
            assert opened.size == (image["width"], image["height"])
            assert 240 <= min(opened.size) <= max(opened.size) <= 400
            sizes.add(opened.size)
    assert len(sizes) > 20
    assert {width > height for width, height in sizes} == {True, False}


def test_boxes_and_areas_match_the_polygons(data_dir: Path) -> None:
    check_polygons(contents(data_dir, "train"), rel=0.05)


@pytest.mark.parametrize("shape", toy.SHAPES, ids=lambda shape: shape.name)
def test_shape_covers_exactly_the_pixels_of_its_polygon(shape: toy.Shape) -> None:
    rng = np.random.default_rng(0)
    shifts = []
    for _ in range(50):
        polygon = (toy._sample_polygon(rng, shape) + 1) * rng.uniform(30, 150) + rng.uniform(0, 1, size=2)
        alpha, (rows, columns) = toy._rasterize(polygon)
        assert alpha.sum() == pytest.approx(toy._polygon_area(polygon), rel=0.03)
        covered = np.flatnonzero((alpha > 0).any(axis=1)) + rows.start
        assert abs(covered[0] - polygon[:, 1].min()) <= 1.01
        assert abs(covered[-1] + 1 - polygon[:, 1].max()) <= 1.01
        weight = alpha.sum(axis=0) / alpha.sum()
        shifts.append(weight @ (np.arange(columns.start, columns.stop) + 0.5) - _centroid_x(polygon))
    assert abs(np.mean(shifts)) < 0.04  # pixels; half a pixel of the supersampled bitmap would be 0.125


def _centroid_x(polygon: np.ndarray) -> float:
    x, y = polygon.T
    cross = x * np.roll(y, -1) - np.roll(x, -1) * y
    return float(((x + np.roll(x, -1)) * cross).sum() / (3 * cross.sum()))


def test_crowds_have_the_rle_and_the_tight_box_of_their_mask(data_dir: Path) -> None:
    (row,) = (row for row in contents(data_dir, "val")["annotations"] if row["iscrowd"])
    check_crowd(row)


def test_pixels_of_a_polygon_have_the_color_of_its_category(data_dir: Path) -> None:
    for row in contents(data_dir, "train")["annotations"]:
        if row["iscrowd"]:
            continue
        path = data_dir / "train2017" / f"{row['image_id']:012}.jpg"
        pixels = np.asarray(Image.open(path).convert("HSV"), dtype=float)
        (encoded,) = rle.frPyObjects(row["segmentation"], *pixels.shape[:2])
        inside = rle.decode(encoded).astype(bool)
        angle = pixels[inside, 0] * (2 * np.pi / 256)
        hue = np.arctan2(np.sin(angle).mean(), np.cos(angle).mean()) / (2 * np.pi)
        shape = next(shape for shape in toy.SHAPES if shape.id == row["category_id"])
        assert abs((hue - shape.hue + 0.5) % 1 - 0.5) < 0.1
        assert pixels[inside, 1].mean() > 80


def test_shapes_do_not_overlap(data_dir: Path) -> None:
    for image in contents(data_dir, "train")["images"]:
        covered = np.zeros((image["height"], image["width"]), dtype=int)
        for row in contents(data_dir, "train")["annotations"]:
            if row["image_id"] == image["id"]:
                polygons = row["segmentation"]
                encoded = rle.frPyObjects(polygons, image["height"], image["width"])
                covered += rle.decode(encoded if row["iscrowd"] else encoded[0])
        assert covered.max() <= 1


def test_info_names_the_generator_and_its_parameters(data_dir: Path) -> None:
    data = contents(data_dir, "val")
    assert "not COCO" in data["info"]["description"]
    assert (data["info"]["train_images"], data["info"]["val_images"], data["info"]["seed"]) == (40, 6, 3)
    assert data["licenses"][0]["id"] == data["images"][0]["license"]


def test_second_call_writes_nothing(tmp_path: Path) -> None:
    spec = toy.ToySpec(train_images=2, val_images=1)
    assert toy.generate(tmp_path, spec)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert not toy.generate(tmp_path, spec)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_other_parameters_replace_the_data_set(tmp_path: Path) -> None:
    toy.generate(tmp_path, toy.ToySpec(train_images=3, val_images=1))
    assert toy.generate(tmp_path, toy.ToySpec(train_images=2, val_images=1, seed=1))
    assert len(list((tmp_path / "train2017").iterdir())) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(toy.SUBDIRS)


def test_data_set_with_a_missing_image_is_generated_again(tmp_path: Path) -> None:
    spec = toy.ToySpec(train_images=2, val_images=1)
    toy.generate(tmp_path, spec)
    expected = digests(tmp_path)
    (tmp_path / "train2017" / "000000000001.jpg").unlink()
    assert toy.generate(tmp_path, spec)
    assert digests(tmp_path) == expected


@pytest.mark.parametrize("foreign", ["notes.txt", "train2017/000000000001.jpg", "annotations/instances_train2017.json"])
def test_folder_with_foreign_content_is_rejected_unchanged(
    tmp_path: Path, foreign: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / foreign
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"info": {"description": "COCO 2017 Dataset"}}')
    assert run_main(monkeypatch, tmp_path, "--train-images", 2, "--val-images", 1) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds something other than synthetic images")
    assert list(digests(tmp_path)) == [foreign]


def test_file_instead_of_a_folder_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert run_main(monkeypatch, tmp_path / "file") == 2
    assert run_main(monkeypatch, tmp_path / "file" / "below") == 2


@pytest.mark.parametrize("flags", [["--train-images", "0"], ["--val-images", "-1"], ["--seed", "-1"], ["--sed", "1"]])
def test_invalid_flag_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, tmp_path / "data", *flags)
    assert stop.value.code == 2
    assert not (tmp_path / "data").exists()


def test_killed_generation_is_not_mistaken_for_a_complete_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    command = [sys.executable, "-m", "detection.synthetic.toy", folder, "--train-images", "100000"]
    with subprocess.Popen(command, cwd=ROOT) as process:
        deadline = time.monotonic() + 30
        while not list(folder.glob(f"{toy.TMP_PREFIX}*/new/train2017/*.jpg")) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not any((folder / subdir).exists() for subdir in toy.SUBDIRS)
    assert toy.generate(folder, toy.ToySpec(train_images=2, val_images=1))
    assert len(coco.read(*coco.standard_paths(folder, "train"))) == 2


def test_command_reports_whether_it_generated_the_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (tmp_path / "data", "--train-images", 2, "--val-images", 1)
    assert run_main(monkeypatch, *arguments) == 0
    assert "generated 2 + 1 images (seed 0)" in capsys.readouterr().out
    assert run_main(monkeypatch, *arguments) == 0
    assert "already has 2 + 1 images (seed 0)" in capsys.readouterr().out


def test_data_set_of_the_earlier_module_name_is_kept(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    for split in ("train", "val"):
        path = toy.annotation_path(folder, split)
        path.write_text(path.read_text().replace("detection.synthetic.toy", "detection.toy"))
    before = digests(folder)
    assert not toy.generate(folder, SMALL)
    assert digests(folder) == before
