import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import http_mirror
from detection.data import (
    coco,
    coco_arrays,
    coco_json,
    open_images,
    open_images_download,
    open_images_labels,
)
from detection.evaluation.coco_metric import CocoBoxMetric

HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
NAMES = ("Ant", "Bee", "Cow")
SIZES_WH = {
    "train": {1: (10, 20), 2: (31, 7), 0xFEDCBA9876543210: (16, 16), 4: (8, 8)},
    "validation": {5: (9, 5), 6: (4, 4)},
}
BOXES = {
    "train": [
        "0000000000000001,xclick,/m/cow,1,0.1,0.7,0.2,0.3,0,1,0,0,1",
        "0000000000000001,xclick,/m/zoo,1,0.5,0.6,0.5,0.6,0,0,0,0,0",  # of no class
        "0000000000000001,activemil,/m/ant,1,0,0.999,0,1,-1,-1,-1,-1,-1",  # unknown flags are true in fiftyone
        "fedcba9876543210,xclick,/m/bee,1,0.25,0.5,0.25,0.75,0,0,1,0,0",
        "0000000000000002,xclick,/m/ant,1,0.333333,0.666667,0.1,0.9,1,0,0,1,0",
        "0000000000000003,xclick,/m/ant,1,0.1,0.2,0.1,0.2,0,0,0,0,0",  # not in the list of images
        "0000000000000004,xclick,/m/zoo,1,0.1,0.2,0.1,0.2,0,0,0,0,0",  # an image without a box of the classes
    ],
    "validation": [
        "0000000000000005,xclick,/m/ant,1,0.1,0.2,0.1,0.2,0,0,0,0,0",
        "0000000000000006,xclick,/m/bee,1,0.5,0.75,0.25,1,0,0,0,0,0",
    ],
}  # fmt: skip


@pytest.fixture
def server(monkeypatch):
    with http_mirror.serve(monkeypatch) as server:
        add_mirror(server.files)
        yield server


def add_mirror(files):
    files["/v5/class-descriptions-boxable.csv"] = b"/m/bee,Bee\n/m/ant,Ant\n/m/cow,Cow\n/m/zoo,Zoo\n"
    for split, sources in open_images_download.SOURCES.items():
        sizes = SIZES_WH[split]
        files[f"/{sources.boxes}"] = "\n".join([HEADER, *BOXES[split], ""]).encode()
        rows = [f"{key:016x},{split},http://x/y" for key in sizes]
        files[f"/{sources.image_ids}"] = "\n".join(["ImageID,Subset,OriginalURL", *rows, ""]).encode()
        for key, size in sizes.items():
            files[f"/{split}/{key:016x}.jpg"] = jpeg(size)


def jpeg(size, orientation=6):
    """Return a JPEG file that EXIF declares to be rotated."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.fixture
def download(server, tmp_path, capsys):
    """Run the command, and return its status, output and errors."""
    names = tmp_path / "names.txt"
    names.write_text("\n".join(NAMES) + "\n")

    def run(*flags):
        urls = ["--annotations-url", server.url, "--images-url", f"{server.url}/", "--classes", str(names)]
        status = open_images_download.main([str(tmp_path / "oi"), *urls, *flags])
        return status, *capsys.readouterr()

    return run


def read(tmp_path, split="train"):
    return json.loads((tmp_path / "oi" / split / open_images.ANNOTATION_FILE).read_text())


def last_error(err):
    return [line for line in err.splitlines() if line.startswith(("error: ", "warning: "))][-1]


def flags(text):
    return dict(zip(open_images_labels.FLAGS, (letter == "1" for letter in text), strict=True))


def test_annotations_are_those_of_fiftyone(download, tmp_path):
    status, out, err = download()
    assert status == 0, err
    train = read(tmp_path)
    assert train["licenses"] == []
    assert train["categories"] == [{"id": i, "name": name, "supercategory": None} for i, name in enumerate(NAMES)]
    images = [(image["id"], image["file_name"], image["width"], image["height"]) for image in train["images"]]
    assert images == [
        (1, "0000000000000001.jpg", 10, 20),
        (2, "0000000000000002.jpg", 31, 7),
        (3, "fedcba9876543210.jpg", 16, 16),
    ]
    assert all(image["license"] is image["coco_url"] is None and len(image) == 6 for image in train["images"])
    boxes = [
        (1, 1, 2, [0.1 * 10, 0.2 * 20, (0.7 - 0.1) * 10, (0.3 - 0.2) * 20], "01001"),
        (2, 1, 0, [0.0, 0.0, 0.999 * 10, 20.0], "11111"),
        (3, 2, 0, [0.333333 * 31, 0.1 * 7, (0.666667 - 0.333333) * 31, (0.9 - 0.1) * 7], "10010"),
        (4, 3, 1, [4.0, 4.0, 4.0, 8.0], "00100"),
    ]
    assert train["annotations"] == [
        {
            "id": annotation_id,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": bbox,
            "area": bbox[2] * bbox[3],
            "iscrowd": int(text[2]),
            **flags(text),
        }
        for annotation_id, image_id, category_id, bbox, text in boxes
    ]
    assert type(train["annotations"][0]["IsInside"]) is bool
    validation = read(tmp_path, "validation")
    assert [a["image_id"] for a in validation["annotations"]] == [1, 2]
    assert f"{tmp_path}/oi/train/labels/openimages-mlperf.json: 3 images, 4 boxes, 3 classes" in out
    assert "warning: MLPerf's train split has 1170301 images" in err


def test_blocks_do_not_change_the_annotations(download, tmp_path, monkeypatch):
    download()
    whole = read(tmp_path)
    (tmp_path / "oi/train" / open_images.ANNOTATION_FILE).unlink()
    monkeypatch.setattr(open_images_labels, "BOXES_PER_BLOCK", 3)
    monkeypatch.setattr(open_images_download, "IMAGES_PER_TASK", 2)
    download()
    assert read(tmp_path) == whole


def test_arrays_hold_the_columns_of_the_annotations(download, tmp_path):
    download()
    for split in open_images_download.SOURCES:
        annotation_file = tmp_path / "oi" / split / open_images.ANNOTATION_FILE
        columns, expected = coco_arrays.read_arrays(annotation_file), coco_json.read(annotation_file)
        assert columns is not None
        for field in dataclasses.fields(expected):
            if field.name != "is_valid":
                np.testing.assert_array_equal(getattr(columns, field.name), getattr(expected, field.name))


def test_a_second_run_replaces_stale_arrays(download, tmp_path):
    download()
    arrays_file = coco_arrays.arrays_path(tmp_path / "oi/train" / open_images.ANNOTATION_FILE)
    content = arrays_file.read_bytes()
    arrays_file.write_bytes(content[:-1])
    assert f"{arrays_file}: 3 images, 4 boxes" in download()[1]
    assert arrays_file.read_bytes() == content
    assert f"{arrays_file} is current" in download()[1]


def test_training_and_metric_accept_category_0(download, tmp_path):
    download()
    annotation_file, image_dir = open_images.paths(tmp_path / "oi", "train")
    split = coco.read(annotation_file, image_dir)
    assert [(category.id, category.name) for category in split.categories] == list(enumerate(NAMES))
    assert split.labels.tolist() == [3, 1, 1, 2]
    assert coco_json.read_categories(annotation_file) == list(enumerate(NAMES))
    rows = [[a["image_id"] - 1, *a["bbox"], 0.9, a["category_id"] + 1] for a in read(tmp_path)["annotations"]]
    rows = np.array(rows)
    for backend in ("pycocotools", "hotcoco"):
        metric = CocoBoxMetric(split, backend)
        assert metric(rows)["AP"] == pytest.approx(1.0)
        ap = {row["name"]: (row["AP"], row["objects"]) for row in metric.per_class_ap()}
        assert ap == {"Ant": (pytest.approx(1.0), 1), "Bee": (None, 0), "Cow": (pytest.approx(1.0), 1)}
        rows_of_wrong_class = rows.copy()
        rows_of_wrong_class[:, 6] = 2
        assert metric(rows_of_wrong_class)["AP"] == 0


def test_a_second_run_sends_no_request(download, server, tmp_path):
    download()
    assert len([r for r in server.requests if r.endswith(".jpg")]) == 5
    server.requests.clear()
    status, out, _ = download()
    assert (status, server.requests) == (0, [])
    assert f"{tmp_path}/oi/train/labels/openimages-mlperf.json already exists" in out


def test_a_removed_image_is_downloaded_again(download, server, tmp_path):
    download()
    (tmp_path / "oi/train/data/0000000000000002.jpg").unlink()
    server.requests.clear()
    assert download()[0] == 0
    assert server.requests == ["/train/0000000000000002.jpg"]


def test_a_trial_has_the_first_images_and_a_later_run_adds_the_others(download, server, tmp_path):
    assert download("--max-images", "1")[0] == 0
    assert [i["file_name"] for i in read(tmp_path)["images"]] == ["0000000000000001.jpg"]
    assert len(read(tmp_path)["annotations"]) == 2
    assert len([r for r in server.requests if r.endswith(".jpg")]) == 2
    server.requests.clear()
    assert download()[0] == 0
    assert len(server.requests) == 3
    assert len(read(tmp_path)["images"]) == 3


def test_a_file_resumes_after_each_broken_connection(download, server, tmp_path):
    path = f"/{open_images_download.SOURCES['train'].boxes}"
    server.faults[path] = [{"cut": 100}, {"status": 503}, {"cut": 50}]
    assert download()[0] == 0
    requests = [r for r in server.requests if r.startswith(path)]
    assert requests == [path, f"{path} bytes=100-", f"{path} bytes=100-", f"{path} bytes=150-"]
    assert (tmp_path / "oi/train/labels/detections.csv").read_bytes() == server.files[path]


def test_a_killed_run_resumes_from_the_bytes_it_has(download, server, tmp_path):
    labels = tmp_path / "oi/train/labels"
    labels.mkdir(parents=True)
    path = f"/{open_images_download.SOURCES['train'].boxes}"
    (labels / "detections.csv.part").write_bytes(server.files[path])
    assert download()[0] == 0
    assert [r for r in server.requests if r.startswith(path)] == [f"{path} bytes={len(server.files[path])}-"]
    assert sorted(p.name for p in labels.iterdir()) == [
        "detections.csv",
        "openimages-mlperf.json",
        "openimages-mlperf.npz",
    ]


def test_a_broken_connection_is_retried_then_reported_and_the_next_run_continues(download, server, tmp_path):
    path = "/train/0000000000000002.jpg"
    server.faults[path] = [{"cut": 100}] * 3
    assert download("--max-images", "1")[0] == 0
    server.faults[path] *= 2
    status, _, err = download("--workers", "1")
    assert status == 1
    size = len(server.files[path])
    assert last_error(err) == (
        f"error: {server.url}{path}: the download failed: the connection closed after 100 of {size} bytes. "
        "Run this again: it continues"
    )
    assert not (tmp_path / "oi/train/data/0000000000000002.jpg").exists()
    server.requests.clear()
    assert download()[0] == 0  # two more faults
    assert server.requests.count(path) == 3
    assert "/train/0000000000000001.jpg" not in server.requests


def test_an_unreachable_server_is_reported(download, server, tmp_path):
    status, _, err = download("--annotations-url", "http://127.0.0.1:9")
    assert status == 1
    assert last_error(err) == (
        "error: http://127.0.0.1:9/v5/class-descriptions-boxable.csv: the download failed: Connection refused. "
        "Run this again: it continues"
    )


def test_missing_images_are_listed_and_can_be_left_out(download, server, tmp_path):
    content = server.files.pop("/train/0000000000000001.jpg")
    status, _, err = download()
    assert status == 1
    assert last_error(err).startswith(f"error: {server.url}/train: 1 of 3 images are missing: 0000000000000001. Run")
    assert not (tmp_path / "oi/train" / open_images.ANNOTATION_FILE).exists()
    assert len(list((tmp_path / "oi/train/data").iterdir())) == 2

    status, _, err = download("--skip-missing")
    assert status == 0
    assert "1 of 3 images are missing: 0000000000000001. They are left out with their boxes" in err
    train = read(tmp_path)
    assert [(i["id"], i["file_name"][:4]) for i in train["images"]] == [(1, "0000"), (2, "fedc")]
    assert [(a["id"], a["image_id"]) for a in train["annotations"]] == [(1, 1), (2, 2)]

    server.files["/train/0000000000000001.jpg"] = content
    assert download()[0] == 0
    assert len(read(tmp_path)["images"]) == 3


def test_a_wrong_address_of_the_images_stops_early(download, server, monkeypatch):
    monkeypatch.setattr(open_images_download, "MAX_MISSING_IMAGES", 1)
    status, _, err = download("--images-url", f"{server.url}/nowhere", "--workers", "1")
    assert status == 1
    assert "the server returned status 404, and so it did for 1 other images" in last_error(err)


def test_a_page_instead_of_an_image_is_rejected(download, server, tmp_path):
    server.files["/train/0000000000000001.jpg"] = b"<html>log in first</html>"
    status, _, err = download()
    assert status == 1
    assert last_error(err) == f"error: {server.url}/train/0000000000000001.jpg: the server sent no JPEG image"
    assert not (tmp_path / "oi/train/data/0000000000000001.jpg").exists()


@pytest.mark.parametrize(
    ("full", "name"),
    [
        ("train/data/.0000000000000001.jpg.partial", "train/data/0000000000000001.jpg"),
        ("train/labels/detections.csv.part", "train/labels/detections.csv.part"),
        ("train/labels/.openimages-mlperf.json.partial", "train/labels/openimages-mlperf.json"),
        ("train/labels/.openimages-mlperf.npz.partial", "train/labels/openimages-mlperf.npz"),
    ],
)
def test_a_full_disk_is_reported_and_the_next_run_continues(download, tmp_path, full, name):
    path = tmp_path / "oi" / full
    path.parent.mkdir(parents=True)
    path.symlink_to("/dev/full")
    status, _, err = download()
    assert status == 1
    assert last_error(err) == (
        f"error: {tmp_path}/oi/{name}: No space left on device. Free some space and run this again: it continues"
    )
    path.unlink(missing_ok=True)
    assert download()[0] == 0
    assert len(read(tmp_path)["images"]) == 3


def test_a_disk_that_is_too_small_is_reported_before_the_images(download, server, monkeypatch):
    monkeypatch.setattr(open_images_download, "MEAN_IMAGE_BYTES", 10**18)
    status, _, err = download()
    assert status == 2
    assert "2 images need about 2000000000.0 GB, but its disk has " in last_error(err)
    assert not [r for r in server.requests if r.endswith(".jpg")]


def test_annotations_of_another_program_stay(download, tmp_path):
    path = tmp_path / "oi/validation" / open_images.ANNOTATION_FILE
    path.parent.mkdir(parents=True)
    path.write_text('{"info": {"description": "Exported from FiftyOne"}}')
    status, _, err = download()
    assert status == 2
    assert "another program wrote it. Train with it as it is, or remove it" in last_error(err)
    assert "FiftyOne" in path.read_text()


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("0000000000000001,x,/m/ant,1,0.1,a,0,1,0,0,0,0,0", "could not convert string to float: 'a'"),
        ("0000000000000001,x,/m/ant,1,0.1,1,0,1,0,0,0,0", "a column is missing"),
        ("image,x,/m/ant,1,0.1,1,0,1,0,0,0,0,0", "invalid literal for int() with base 16: 'image'"),
        ("1,x,/m/ant,1,0.1,1,0,1,0,0,0,0,0", "'1' is not an image id"),
        ("0000000000000001,x,/m/ant,1,0.1,1,0,1,0,0,,0,0", "invalid literal for int() with base 10: ''"),
    ],
)
def test_an_invalid_row_is_named(tmp_path, row, problem):
    path = tmp_path / "boxes.csv"
    path.write_text(f"{HEADER}\n{BOXES['train'][0]}\n{row}\n")
    with pytest.raises(open_images_labels.InputError) as error:
        open_images_labels.read_boxes(path, {"/m/cow": 0, "/m/ant": 1})
    assert str(error.value) == f"{path}, line 3: {problem}. Remove it and run this again."


def test_other_files_are_rejected(tmp_path):
    path = tmp_path / "file.csv"
    path.write_text("<html>\n")
    with pytest.raises(open_images_labels.InputError, match=r"file\.csv: it has no column ImageID"):
        open_images_labels.read_image_ids(path)
    with pytest.raises(open_images_labels.InputError, match="1 classes are missing, first Ant"):
        open_images_labels.read_category_ids(path, ["Ant"])


@pytest.mark.parametrize("flag", ["--max-images", "--workers"])
@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_an_invalid_count_is_rejected(download, server, flag, value):
    status, _, err = download(f"{flag}={value}")
    assert (status, last_error(err)) == (2, f"error: {flag} {value}: not a positive integer.")


def test_mlperf_has_264_classes_in_alphabetical_order():
    names = open_images_download.read_names(Path(open_images_download.CLASSES_FILE))
    assert (len(names), names[0], names[-1]) == (264, "Airplane", "Zucchini")
    assert list(names) == sorted(names)
