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

import commands
from annotation_file import contents, digests
from config_files import set_only
from detection.config.settings import InputError
from detection.data import coco
from detection.evaluation.coco_metric import CocoBoxMetric
from detection.synthetic import coco_scenes, coco_sized
from detection.synthetic.coco_sized import CocoSizedSpec
from generated import check_crowd, check_polygons
from paths import ROOT, shared

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools

SMALL = CocoSizedSpec(train_images=40, seed=3)
COMMAND = [sys.executable, "-m", "detection.synthetic.coco_sized"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic_coco") / "data"
    assert coco_sized.generate(folder, SMALL, workers=1)
    return folder


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["synthetic_coco", *map(str, arguments)])
    return coco_sized._main()


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] == "Z"
    except FileNotFoundError:
        return True


def test_bytes_depend_on_the_seed_and_not_on_the_number_of_processes(data_dir: Path, tmp_path: Path) -> None:
    coco_sized.generate(tmp_path / "two", SMALL, workers=2)
    assert digests(tmp_path / "two") == digests(data_dir)
    coco_sized.generate(tmp_path / "other", CocoSizedSpec(train_images=2, seed=4), workers=1)
    assert not set(digests(tmp_path / "other").values()) & set(digests(data_dir).values())


def test_all_images_differ(data_dir: Path) -> None:
    images = [digest for name, digest in digests(data_dir).items() if name.endswith(".jpg")]
    assert len(images) == len(set(images)) == 40 + 50


def test_killed_generation_leaves_no_process_and_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    spec, killed, uninterrupted = CocoSizedSpec(train_images=150), tmp_path / "killed", tmp_path / "uninterrupted"
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
    assert not coco_sized.is_complete(killed, spec)

    (killed / "train2017/000000000001.jpg").write_bytes(b"")  # as after a power failure
    (killed / f"val2017/{coco_sized.TMP_PREFIX}1").write_bytes(b"half")
    assert coco_sized.generate(killed, spec)
    coco_sized.generate(uninterrupted, spec)
    assert digests(killed) == digests(uninterrupted)


def test_larger_data_set_extends_a_smaller_one_and_keeps_its_images(data_dir: Path, tmp_path: Path) -> None:
    folder, larger = tmp_path / "grown", CocoSizedSpec(train_images=60, seed=3)
    shutil.copytree(data_dir, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}
    assert coco_sized.generate(folder, larger)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    coco_sized.generate(tmp_path / "at once", larger)
    assert digests(folder) == digests(tmp_path / "at once")

    assert coco_sized.generate(folder, SMALL)
    assert contents(folder, "train") == contents(data_dir, "train")
    assert len(list(folder.glob("train2017/*"))) == 60


def test_annotations_are_absent_during_generation(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(coco_sized, "_generate_split", fail)
    with pytest.raises(OSError, match="No space"):
        coco_sized.generate(folder, CocoSizedSpec(train_images=41, seed=3))
    assert not list((folder / "annotations").iterdir())
    assert not coco_sized.is_complete(folder, SMALL)


def test_shrunken_annotations_of_an_earlier_data_set_are_removed(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    shrunken = folder / "annotations/bbox_only_instances_train2017.json"
    shutil.copy(folder / "annotations/instances_train2017.json", shrunken)
    coco_sized.generate(folder, CocoSizedSpec(train_images=41, seed=3))
    assert not shrunken.exists()


def test_second_call_writes_nothing(data_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
    assert not coco_sized.generate(data_dir, SMALL)
    assert {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")} == before


def test_missing_image_is_generated_again(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    (folder / coco_sized.MARKER).unlink()  # as after a copy with *, which skips it
    (folder / "val2017/000000000002.jpg").unlink()
    assert coco_sized.generate(folder, SMALL)
    assert digests(folder) == digests(data_dir)


def test_concurrent_calls_generate_once(tmp_path: Path) -> None:
    command = [*COMMAND, tmp_path, "--images", "100", "--workers", "1"]
    calls = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [call.communicate()[0] for call in calls]
    assert [call.returncode for call in calls] == [0, 0]
    assert sorted("generated" in output for output in outputs) == [False, True]
    assert not list(tmp_path.glob(f"*/{coco_sized.TMP_PREFIX}*"))


def test_data_set_of_the_earlier_module_name_is_kept_and_extended(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    (folder / coco_sized.MARKER).rename(folder / coco_sized.EARLIER_MARKERS[0])
    for path in (folder / coco_sized.EARLIER_MARKERS[0], *folder.glob("annotations/*.json")):
        path.write_text(path.read_text().replace(coco_sized.GENERATOR.name, coco_sized.GENERATOR.earlier_names[0]))
    before = digests(folder)
    assert not coco_sized.generate(folder, SMALL)
    assert digests(folder) == before

    for path in folder.glob("annotations/*.json"):
        path.unlink()
    (folder / "train2017/000000000001.jpg").unlink()
    assert coco_sized.generate(folder, SMALL)
    assert coco_sized.is_complete(folder, SMALL)


@pytest.mark.parametrize(
    "foreign", ["notes.txt", "train2017/000000000001.jpg", "annotations/instances_train2017.json", "file"]
)
def test_folder_with_foreign_content_is_rejected_unchanged(
    tmp_path: Path, foreign: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / foreign
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"info": {"description": "COCO 2017 Dataset"}}')
    folder = file if foreign == "file" else tmp_path
    assert run_main(monkeypatch, folder, "--images", 2) == 2
    assert capsys.readouterr().err.startswith(f"error: {folder} holds something other than synthetic COCO images")
    assert list(digests(tmp_path)) == [foreign]


def test_folder_of_the_real_coco_is_rejected_unchanged(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    annotations = folder / "annotations/instances_val2017.json"
    annotations.write_text('{"info": {"description": "COCO 2017 Dataset", "contributor": "COCO Consortium"}}')
    before = digests(folder)
    with pytest.raises(InputError, match="something other"):
        coco_sized.generate(folder, SMALL)
    assert digests(folder) == before


def test_data_set_of_another_seed_is_rejected_unchanged(data_dir: Path) -> None:
    before = digests(data_dir)
    with pytest.raises(InputError, match="a synthetic COCO of seed 3, version 1, not of seed 4"):
        coco_sized.generate(data_dir, CocoSizedSpec(train_images=40, seed=4))
    assert digests(data_dir) == before


def test_full_disk_is_rejected_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(coco_sized.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**7, 10**7))
    assert run_main(monkeypatch, tmp_path / "new", "--images", 100) == 2
    message = capsys.readouterr().err
    assert "150 images and the annotations need 0.03 GB" in message
    assert "0.01 GB free" in message
    assert not (tmp_path / "new").exists()


def test_required_disk_space_matches_the_files(data_dir: Path) -> None:
    total = sum(path.stat().st_size for path in data_dir.rglob("*") if path.is_file())
    assert total == pytest.approx(90 * (coco_sized.JPEG_BYTES + coco_sized.ANNOTATION_BYTES), rel=0.2)


def test_existing_images_need_no_disk_space(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data_dir, folder)
    (folder / "train2017/000000000001.jpg").unlink()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(coco_sized.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    assert coco_sized.generate(folder, SMALL)


@pytest.mark.parametrize("flags", [["--images", "0"], ["--workers", "-1"], ["--seed", "-1"], ["--sed", "1"]])
def test_invalid_flag_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, tmp_path / "data", *flags)
    assert stop.value.code == 2
    assert not (tmp_path / "data").exists()


def test_data_set_reads_as_coco_with_nothing_dropped_or_clipped(data_dir: Path) -> None:
    for name, num_images in SMALL.split_sizes().items():
        split = coco.read(*coco.standard_paths(data_dir, name))  # type: ignore[arg-type]
        assert len(split) == num_images
        assert split.num_classes == 81
        assert (split.num_dropped_boxes, split.num_clipped_boxes, split.num_missing_images) == (0, 0, 0)
    train_ids = {image["id"] for image in contents(data_dir, "train")["images"]}
    assert not train_ids & {image["id"] for image in contents(data_dir, "val")["images"]}


def test_categories_match_coco() -> None:
    ids = [category.id for category in coco_scenes.COCO_CATEGORIES]
    assert len(ids) == len({category.name for category in coco_scenes.COCO_CATEGORIES}) == 80
    assert set(range(1, 91)) - set(ids) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert sum(category.num_boxes for category in coco_scenes.COCO_CATEGORIES) == 860_001


def test_categories_and_keys_match_a_sample_of_coco(data_dir: Path) -> None:
    synthetic, real = (
        contents(data_dir, "train"),
        json.loads(shared("data/coco-tiny/annotations/instances_train2017.json").read_text()),
    )
    assert synthetic["categories"] == real["categories"]
    for part in ("images", "annotations"):
        assert synthetic[part][0].keys() == real[part][0].keys()


def test_number_of_images_without_boxes_matches_coco() -> None:
    for split, (num_empty, num_images) in coco_scenes.EMPTY_RATE.items():
        assert sum(coco_scenes.is_empty(split, index) for index in range(num_images)) == num_empty
        assert any(coco_scenes.is_empty(split, index) for index in range(40))


@pytest.mark.slow
def test_distribution_of_boxes_matches_coco(tmp_path: Path) -> None:
    coco_sized.generate(tmp_path, CocoSizedSpec(train_images=12_000), with_images=False)
    assert not list(tmp_path.glob("*/*.jpg"))
    train = contents(tmp_path, "train")
    rows = train["annotations"]
    boxes = np.unique([row["image_id"] for row in rows], return_counts=True)[1]
    assert len(train["images"]) - len(boxes) == pytest.approx(12_000 * 1021 / 118_287, abs=1)
    assert boxes.mean() == pytest.approx(860_001 / 117_266, rel=0.02)
    assert np.median(boxes) in (4, 5)
    assert np.percentile(boxes, 99) == pytest.approx(34, abs=3)
    assert 70 <= boxes.max() <= 93

    is_crowd = np.array([row["iscrowd"] for row in rows], dtype=bool)
    assert is_crowd.mean() == pytest.approx(10_052 / 860_001, rel=0.15)
    areas = np.array([row["area"] for row in rows])[~is_crowd]
    assert (areas < 32**2).mean() == pytest.approx(0.41, abs=0.02)
    assert (areas > 96**2).mean() == pytest.approx(0.24, abs=0.02)

    counts = np.bincount([row["category_id"] for row in rows])[
        [category.id for category in coco_scenes.COCO_CATEGORIES]
    ]
    assert counts[0] / len(rows) == pytest.approx(262_465 / 860_001, abs=0.02)
    boxes_in_coco = [category.num_boxes for category in coco_scenes.COCO_CATEGORIES]
    assert np.corrcoef(np.log(counts), np.log(boxes_in_coco))[0, 1] > 0.97
    categories_per_image = len({(row["image_id"], row["category_id"]) for row in rows}) / len(boxes)
    assert categories_per_image == pytest.approx(2.9, abs=0.25)

    pixels = np.array([image["width"] * image["height"] for image in train["images"]])
    assert pixels.mean() == pytest.approx(270_000, rel=0.03)
    is_typical = (pixels > 167_500) & (pixels < 355_840)
    assert is_typical.mean() == pytest.approx(0.9, abs=0.06)
    corners = [sum(map(len, row["segmentation"])) / 2 for row in rows if not row["iscrowd"]]
    assert np.mean(corners) == pytest.approx(21.5, abs=2)


def test_images_are_jpegs_like_those_of_coco(data_dir: Path) -> None:
    lengths = []
    for image in contents(data_dir, "train")["images"]:
        path = data_dir / "train2017" / image["file_name"]
        assert image["file_name"] == f"{image['id']:012}.jpg"
        with Image.open(path) as opened:
            assert opened.size == (image["width"], image["height"])
            assert opened.format == "JPEG"
            assert "progressive" not in opened.info
            channels = {"RGB": 3, "L": 1}[opened.mode]
            assert [layer[1:3] for layer in opened.layer] == [(1, 1)] * channels  # type: ignore[attr-defined]
        lengths.append(path.stat().st_size)
    assert 112_000 < np.mean(lengths) < 205_000
    assert 45_000 < np.std(lengths) < 110_000
    assert min(lengths) < 90_000
    assert max(lengths) > 250_000


def test_grayscale_image_has_one_channel() -> None:
    shard = next(s for s in range(100) if coco_scenes.plan_shard(SMALL.seed, "train", s).is_grayscale.any())
    plan = coco_scenes.plan_shard(SMALL.seed, "train", shard)
    encoded = coco_scenes.render_jpeg(plan, int(plan.is_grayscale.argmax()))
    with Image.open(io.BytesIO(encoded)) as opened:
        assert opened.mode == "L"


def test_boxes_and_areas_match_the_polygons(data_dir: Path) -> None:
    check_polygons(contents(data_dir, "val"), rel=0.1)


def test_crowds_have_the_rle_and_the_tight_box_of_their_mask(tmp_path: Path) -> None:
    coco_sized.generate(tmp_path, CocoSizedSpec(train_images=200), with_images=False)
    crowds = [row for row in contents(tmp_path, "train")["annotations"] if row["iscrowd"]]
    assert len(crowds) > 5
    for row in crowds:
        check_crowd(row)


def test_smallest_object_of_an_image_has_the_color_of_its_category(data_dir: Path) -> None:
    labels = {category.id: label for label, category in enumerate(coco_scenes.COCO_CATEGORIES)}
    rows = [row for row in contents(data_dir, "train")["annotations"] if not row["iscrowd"]]
    smallest = {row["image_id"]: row for row in sorted(rows, key=lambda row: -row["area"])}
    num_checked = 0
    for row in smallest.values():
        if row["area"] < 15**2:
            continue
        num_checked += 1
        pixels = np.asarray(Image.open(data_dir / "train2017" / f"{row['image_id']:012}.jpg"), dtype=float)
        left, top, width, height = row["bbox"]
        x, y = round(left + width / 2), round(top + height / 2)
        middle = pixels[y - 2 : y + 3, x - 2 : x + 3].mean(axis=(0, 1))
        assert middle == pytest.approx(
            coco_scenes.category_colors()[labels[row["category_id"]], 1].clip(48, 207), abs=30
        )
    assert num_checked > 10


def test_ground_truth_scores_one_with_both_backends(data_dir: Path) -> None:
    split = coco.read(*coco.standard_paths(data_dir, "val"))
    image_index = {image_id: index for index, image_id in enumerate(split.image_ids.tolist())}
    label = {category.id: label for label, category in enumerate(split.categories, start=1)}
    rows = np.array(
        [
            [image_index[row["image_id"]], *row["bbox"], 1.0, label[row["category_id"]]]
            for row in contents(data_dir, "val")["annotations"]
            if not row["iscrowd"]
        ]
    )
    metrics = CocoBoxMetric(split, "pycocotools")(rows)
    assert metrics["AP"] > 0.99
    assert CocoBoxMetric(split, "hotcoco")(rows) == metrics


def test_preflight_generates_the_configured_images_and_a_dry_run_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_only(monkeypatch, {"LOGDIR": tmp_path / "results", "DATADIR": tmp_path / "data", "SYNTHETIC_IMAGES": 12})
    recipe = ["preflight", "--dataset", "synthetic_coco", "--division", "open", "--batch-size", "4"]
    assert commands.ssd(*recipe, "--dry-run") == 0
    assert "images are generated when the run starts" in capsys.readouterr().out
    assert not (tmp_path / "data").exists()
    assert commands.ssd(*recipe) == 0
    assert "train: 12 images" in capsys.readouterr().err
    assert commands.ssd(*recipe, "--synthetic-images", "13") == 0
    assert "train: 13 images" in capsys.readouterr().err
