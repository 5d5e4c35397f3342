import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import commands
from detection.evaluation import visualize
from detection.evaluation.visualize import Annotation
from paths import ROOT, shared
from ssd import pretrained, train
from ssd.anchors import NUM_ANCHORS, make_anchors
from ssd.model import SSD300
from tiny_ssd import square_detector, write_checkpoint

ANCHOR = NUM_ANCHORS - 4  # square of 261 px at the center of the last feature map, which has one cell


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("square"), square_detector())


def run_predict(capsys, *arguments):
    status = commands.ssd("predict", *arguments, "--device", "cpu")
    return status, *capsys.readouterr()


def read_results(folder: Path):
    return json.loads((folder / "detections.json").read_text())


def test_boxes_are_in_pixels_of_the_displayed_image(square, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 200)).save(tmp_path / "upright.png")
    Image.new("RGB", (300, 200)).save(tmp_path / "rotated.jpg", exif=exif)
    Image.new("L", (5, 7)).save(tmp_path / "tiny.png")
    inputs = [tmp_path / name for name in ("upright.png", "rotated.jpg", "tiny.png")]
    status, out, err = run_predict(capsys, square, *inputs, "--folder", tmp_path / "out")
    assert (status, err) == (0, "")
    assert "3 detections on 3 images" in out
    content = read_results(tmp_path / "out")
    assert content["categories"] == [
        {"id": 10, "name": "disc"},
        {"id": 20, "name": "square"},
        {"id": 30, "name": "triangle"},
    ]
    for entry, path, (width, height) in zip(content["images"], inputs, [(300, 200), (200, 300), (5, 7)], strict=True):
        assert entry["file"] == str(path)
        assert (entry["width"], entry["height"]) == (width, height)
        (detection,) = entry["detections"]
        assert (detection["category_id"], detection["name"], detection["score"]) == (
            20,
            "square",
            pytest.approx(0.9, abs=1e-4),
        )
        left, top, right, bottom = make_anchors().boxes_xyxy[ANCHOR].tolist()
        expected = [left * width, top * height, (right - left) * width, (bottom - top) * height]
        assert detection["bbox"] == pytest.approx(expected, abs=0.01)
    drawn = np.asarray(Image.open(tmp_path / "out" / content["images"][0]["drawn"]))
    is_colored = (drawn == visualize.label_color(2)).all(axis=-1)
    assert drawn.shape == (200, 300, 3)
    assert is_colored[100, 20] or is_colored[100, 19]
    assert not is_colored[60:180, 60:250].any()


def test_detections_depend_on_neither_batch_size_nor_exif_orientation(tmp_path, capsys):
    torch.manual_seed(0)
    path = write_checkpoint(tmp_path, SSD300(4))
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((160, 120))
        image.save(tmp_path / f"{name}.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(tmp_path / "a.png").transpose(Image.Transpose.ROTATE_180).save(tmp_path / "rotated.png", exif=exif)
    inputs = [tmp_path / f"{name}.png" for name in ("a", "rotated", "b", "c")]
    for size in ("1", "3"):
        run_predict(capsys, path, *inputs, "--score", "0.4", "--batch-size", size, "--folder", tmp_path / f"by{size}")
    boxes = []
    for size in ("1", "3"):
        entries = read_results(tmp_path / f"by{size}")["images"]
        boxes.append([[d["bbox"] for d in entry["detections"][:10]] for entry in entries])
    np.testing.assert_allclose(boxes[0], boxes[1], atol=0.05)
    np.testing.assert_allclose(boxes[0][0], boxes[0][1], atol=0.05)
    assert not np.allclose(boxes[0][0], boxes[0][2], atol=0.05)


def test_unreadable_images_are_reported_and_skipped(square, tmp_path, capsys):
    Image.new("CMYK", (30, 20)).save(tmp_path / "good.jpg")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:300])
    inputs = [tmp_path / "broken.jpg", tmp_path / "absent.png", tmp_path / "good.jpg"]
    status, out, err = run_predict(capsys, square, *inputs, "--folder", tmp_path / "out")
    assert status == 0
    assert "2 of 3 images could not be read" in err
    assert re.match(rf"{tmp_path}/good.jpg: 1 objects, \d+ ms\n1 detections on 1 images", out)
    for entry, path in zip(read_results(tmp_path / "out")["images"], inputs, strict=True):
        assert entry["file"] == str(path)
        assert (str(path) in entry.get("error", "")) == (path.name != "good.jpg")
        assert (str(path) in err) == (path.name != "good.jpg")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["detections.json", "good.png"]


def test_exit_status_is_2_if_no_image_can_be_read(square, tmp_path, capsys):
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    status, out, err = run_predict(capsys, square, tmp_path, "--folder", tmp_path / "out")
    assert status == 2
    assert err.startswith(f"error: {tmp_path}/phone.HEIC: HEIC is not supported. Convert it to JPEG or PNG.\n")
    assert "0 detections on 0 images" in out


def test_other_files_of_a_folder_are_skipped_in_one_line(square, tmp_path, capsys):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.png"):
        Image.new("RGB", (30, 20)).save(folder / name)
    for name in ("._a.jpg", "notes.txt", "report.pdf", "sub/Thumbs.db"):
        (folder / name).write_bytes(b"%PDF-1.7")
    status, out, err = run_predict(capsys, square, folder, "--folder", tmp_path / "flat")
    assert (status, err) == (0, "")
    assert out.startswith("skipped 3 files of other kinds: ._a.jpg, notes.txt, report.pdf\n")
    assert [entry["file"] for entry in read_results(tmp_path / "flat")["images"]] == [f"{folder}/a.jpg"]
    status, out, _ = run_predict(capsys, square, folder, "--recursive", "--folder", tmp_path / "deep")
    assert status == 0
    assert "skipped 4 files" in out
    files = [entry["file"] for entry in read_results(tmp_path / "deep")["images"]]
    assert files == [f"{folder}/a.jpg", f"{folder}/sub/b.png"]


@pytest.mark.parametrize("output", [".", "out"])
def test_copies_that_an_earlier_call_drew_are_no_images(square, tmp_path, capsys, output):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg")
    for _ in range(2):
        assert run_predict(capsys, square, tmp_path, "--recursive", "--folder", tmp_path / output)[0] == 0
        assert [entry["file"] for entry in read_results(tmp_path / output)["images"]] == [f"{tmp_path}/a.jpg"]
    assert [path.name for path in (tmp_path / output).glob("*.png")] == ["a.png"]


def test_folder_without_images_is_an_error(square, tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    status, _, err = run_predict(capsys, square, tmp_path)
    assert status == 2
    assert "no image in this folder. Pass a folder with images, or files, or --recursive." in err


def test_only_files_of_an_earlier_call_are_overwritten(square, tmp_path, capsys):
    for name in ("x.png", "sub/x.png", "X.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (30, 20), "blue").save(tmp_path / name)
    (tmp_path / "x_2.png").write_text("not ours")
    before = {name: (tmp_path / name).read_bytes() for name in ("x.png", "sub/x.png", "X.jpg", "x_2.png")}
    inputs = [tmp_path / name for name in ("x.png", "sub/x.png", "X.jpg")]
    for _ in range(2):
        assert run_predict(capsys, square, *inputs, "--folder", tmp_path)[0] == 0
        drawn = [entry["drawn"] for entry in read_results(tmp_path)["images"]]
        assert len({name.lower() for name in drawn}) == 3
        assert drawn[:2] == ["x_3.png", "x_4.png"]
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert len(list(tmp_path.glob("*.png"))) == 5


def test_results_of_another_program_are_kept(square, tmp_path, capsys):
    Image.new("RGB", (30, 20)).save(tmp_path / "x.png")
    (tmp_path / "detections.json").write_text("[]")
    status, _, err = run_predict(capsys, square, tmp_path / "x.png", "--folder", tmp_path)
    assert status == 2
    assert "belongs to another program" in err
    assert (tmp_path / "detections.json").read_text() == "[]"


def test_categories_of_a_checkpoint_without_names_are_numbered(tmp_path, capsys):
    path = write_checkpoint(tmp_path, square_detector())
    state = torch.load(path, weights_only=True)
    del state["categories"]
    torch.save(state, path)
    assert [category.name for category in pretrained.load(path).categories] == ["1", "2", "3"]


def test_errors_print_one_message_and_exit_with_2(square, tmp_path, capsys):
    (tmp_path / "file").touch()
    Image.new("RGB", (30, 20)).save(tmp_path / "x.png")
    for arguments, message in (
        ((tmp_path / "absent.pt", tmp_path / "x.png"), "absent.pt: no such file. Name a checkpoint."),
        ((tmp_path / "x.png", tmp_path / "x.png"), "x.png: not a valid weights file"),
        ((square, tmp_path / "x.png", "--folder", tmp_path / "file"), "file cannot be written (File exists)"),
    ):
        status, _, err = run_predict(capsys, *arguments)
        assert status == 2
        assert message in err
        assert err.count("\n") == 1
    with pytest.raises(SystemExit) as end:
        run_predict(capsys, square, tmp_path / "x.png", "--score", "1.5")
    assert end.value.code == 2
    assert "1.5: should be at least 0 and below 1" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (9000, 3), (640, 480)])
@pytest.mark.parametrize("background", ["black", "white", "red"])
def test_boxes_and_names_are_visible_on_any_background_and_size(size, background):
    image = Image.new("RGB", size, background)
    drawn = visualize.draw_annotations(image, [Annotation((0, 0, size[0], size[1]), 1, "name 0.50")])
    assert image.getcolors() == [(size[0] * size[1], Image.new("RGB", (1, 1), background).getpixel((0, 0)))], "a copy"
    assert visualize.MIN_SIDE_PX <= max(drawn.size) <= max(visualize.MIN_SIDE_PX, visualize.MAX_SIDE_PX)
    pixels = np.asarray(drawn)
    assert (pixels == visualize.label_color(1)).all(axis=-1).any()
    if min(size) > 1:
        assert (pixels == 0).all(axis=-1).any(), "text and border are black"


def test_black_text_is_legible_on_every_color():
    def luminance(color):  # WCAG 2
        parts = [part / 255 for part in color]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    colors = [visualize.label_color(label) for label in range(1, 81)]
    assert min((luminance(color) + 0.05) / 0.05 for color in colors) > 4.5  # level AA
    assert len(set(colors)) == 80


def test_text_of_a_box_at_the_border_is_inside_the_image():
    box = (400.0, 0.0, 499.0, 40.0)
    border = np.asarray(
        visualize.draw_annotations(Image.new("RGB", (500, 400)), [Annotation(box, 1, "a long name 0.99")])
    )
    center = np.asarray(
        visualize.draw_annotations(
            Image.new("RGB", (500, 400)), [Annotation((0.0, 200.0, 499.0, 399.0), 1, "a long name 0.99")]
        )
    )
    num_bright = [int(((part > 0).all(axis=-1)).sum()) for part in (border[:25, 300:], center[175:200])]
    assert num_bright[0] >= num_bright[1] * 0.9, "the label is as visible as in the center"


@pytest.mark.slow
@pytest.mark.data
def test_three_categories_work_from_training_to_drawn_images(tmp_path, capsys):
    data = shared("data/bccd")
    flags = ["--run-dir", str(tmp_path / "run"), "--device", "cpu", "--batch-size", "4", "--num-workers", "0"]
    for split in ("train", "val"):
        flags += [f"--{split}-images", str(data / f"{split}2017")]
        flags += [f"--{split}-annotations", str(data / f"annotations/instances_{split}2017.json")]
    assert train.main([*flags, "--max-steps", "3", "--division", "open"]) == 0
    (path,) = (tmp_path / "run/checkpoints").iterdir()
    command = [sys.executable, "-m", "ssd", "predict", str(path), str(data / "val2017"), "--score", "0.01"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path / "out")], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    content = read_results(tmp_path / "out")
    assert {category["name"] for category in content["categories"]} == {"RBC", "WBC", "Platelets"}
    assert len(content["images"]) == len(list((tmp_path / "out").glob("*.png"))) == 72
    assert sum(len(entry["detections"]) for entry in content["images"]) > 72
