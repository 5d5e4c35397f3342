import json

import pytest
from PIL import ExifTags, Image

from detection.data import coco, image_io, voc_to_coco
from paths import shared

OBJECT = """<object><name>{name}</name><pose>Left</pose>{extra}<bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax>
<ymax>{3}</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"""


@pytest.fixture
def folder(tmp_path):
    """Three images of 100×50: two for training, one for evaluation."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / "voc" / name).mkdir(parents=True)
    add_image(
        tmp_path / "voc", "000001", ("dog", (1, 1, 100, 50), ""), ("cat", (11, 21, 30, 40), "<difficult>1</difficult>")
    )
    add_image(tmp_path / "voc", "000002")
    add_image(tmp_path / "voc", "a name", ("bird", (0, 0, 120.5, 10), "<difficult>0</difficult>"))
    sets = tmp_path / "voc/ImageSets/Main"
    (sets / "train.txt").write_text("000001\n000002\n")
    (sets / "val.txt").write_text("a name -1\n\n")
    (sets / "dog_train.txt").write_text("000001  1\n")
    return tmp_path / "voc"


def add_image(folder, key, *objects, size="<size><width>100</width><height>50</height></size>"):
    objects_xml = "".join(OBJECT.format(*box, name=name, extra=extra) for name, box, extra in objects)
    name = f"<filename>{key}.jpg</filename>"
    (folder / f"Annotations/{key}.xml").write_text(f"<annotation>{name}{size}{objects_xml}</annotation>")
    Image.new("RGB", (100, 50)).save(folder / f"JPEGImages/{key}.jpg")


def convert(folder, capsys):
    status = voc_to_coco.main([str(folder), str(folder.parent / "out")])
    return status, *capsys.readouterr()


def test_inclusive_boxes_from_1_become_coco_boxes(folder, capsys):
    status, out, _ = convert(folder, capsys)
    assert status == 0
    assert sorted(path.name for path in (folder.parent / "out").iterdir()) == [
        "instances_train.json",
        "instances_val.json",
    ]
    train = json.loads((folder.parent / "out/instances_train.json").read_text())
    assert [c["name"] for c in train["categories"]] == ["bird", "cat", "dog"]
    assert [i["file_name"] for i in train["images"]] == ["000001.jpg", "000002.jpg"]
    boxes = [(a["category_id"], a["bbox"], a["area"], a["iscrowd"]) for a in train["annotations"]]
    assert boxes == [(3, [0, 0, 100, 50], 5000, 0), (2, [10, 20, 20, 20], 400, 1)]
    val = json.loads((folder.parent / "out/instances_val.json").read_text())
    assert val["categories"] == train["categories"]
    assert [a["bbox"] for a in val["annotations"]] == [[0, 0, 100, 10]]
    assert val["images"][0]["id"] not in {image["id"] for image in train["images"]}
    assert f"--val-annotations {folder.parent / 'out/instances_val.json'}" in out


def test_converted_files_are_valid_training_data(folder, capsys):
    convert(folder, capsys)
    split = coco.read(folder.parent / "out/instances_train.json", folder / "JPEGImages")
    assert (len(split), split.num_classes, split.is_crowd.tolist()) == (2, 4, [False, True])
    assert (split.num_dropped_boxes, split.num_clipped_boxes) == (0, 0)


def test_folder_without_image_sets_becomes_one_set(folder, capsys):
    for path in (folder / "ImageSets/Main").iterdir():
        path.unlink()
    assert convert(folder, capsys)[0] == 0
    assert len(json.loads((folder.parent / "out/instances_all.json").read_text())["images"]) == 3


def test_image_is_found_by_annotation_name_and_measured_if_its_size_is_missing(folder, capsys):
    add_image(folder, "000002", ("dog", (1, 1, 5, 5), ""), size="<size><width>0</width></size>")
    (folder / "JPEGImages/000002.jpg").rename(folder / "JPEGImages/000002.PNG")
    assert convert(folder, capsys)[0] == 0
    images = json.loads((folder.parent / "out/instances_train.json").read_text())["images"]
    assert (images[1]["file_name"], images[1]["width"], images[1]["height"]) == ("000002.PNG", 100, 50)


@pytest.mark.parametrize("is_displayed", [False, True])
def test_boxes_of_a_rotated_photo_refer_to_its_annotated_size(folder, capsys, is_displayed):
    """The stored pixels are 100×50. Displayed, they are 50×100."""
    width, height = (50, 100) if is_displayed else (100, 50)
    size = f"<size><width>{width}</width><height>{height}</height></size>"
    add_image(folder, "000002", ("dog", (1, 1, 200, 200), ""), size=size)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (100, 50)).save(folder / "JPEGImages/000002.jpg", exif=exif)
    assert convert(folder, capsys)[0] == 0
    split = coco.read(folder.parent / "out/instances_train.json", folder / "JPEGImages")
    assert split.boxes(1).tolist() == [[0, 0, width, height]]
    assert image_io.read(*split.image_file(1)).shape == (3, height, width)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", "invalid XML"),
        ("<?xml version='1.0' encoding='nonsense'?><annotation/>", "invalid XML"),
        ("<annotation><object><name>dog</name></object></annotation>", "bndbox/xmin is '', not a number"),
        (f"<annotation>{OBJECT.format('x', 1, 2, 3, name='a', extra='')}</annotation>", "bndbox/xmin is 'x'"),
        (f"<annotation>{OBJECT.format('nan', 1, 2, 3, name='a', extra='')}</annotation>", "bndbox/xmin is 'nan'"),
        (f"<annotation>{OBJECT.format(9, 1, 2, 3, name='a', extra='')}</annotation>", "has no pixel"),
        (f"<annotation>{OBJECT.format(1, 1, 2, 3, name='', extra='')}</annotation>", "an object has no name"),
        ("<annotation><size><width>50</width><height>100</height></size></annotation>", "50×100 in the annotations"),
        ("<annotation><size><width>100.5</width><height>50</height></size></annotation>", "the size is 100.5×50"),
    ],
)
def test_error_names_an_invalid_annotation_and_nothing_is_written(folder, capsys, text, message):
    (folder / "Annotations/000002.xml").write_text(text)
    status, _, err = convert(folder, capsys)
    assert status == 2
    assert message in err
    assert str(folder / "Annotations/000002.xml") in err
    assert not (folder.parent / "out").exists()


def test_errors_name_missing_files(folder, capsys, tmp_path):
    (folder / "JPEGImages/000001.jpg").unlink()
    (folder / "Annotations/a name.xml").unlink()
    status, _, err = convert(folder, capsys)
    assert status == 2
    assert "000001.xml: its image 000001.* is not in JPEGImages/" in err
    assert "a name.xml: cannot be read (No such file" in err
    assert voc_to_coco.main([str(tmp_path / "absent"), str(tmp_path / "out")]) == 2
    assert "no folder JPEGImages/" in capsys.readouterr().err


@pytest.mark.data
def test_real_voc_boxes_match_an_independent_conversion(tmp_path, capsys):
    """BCCD was published as VOC. Its COCO version, written as VOC again, converts back to itself."""
    data = shared("data/bccd")
    expected = json.loads((data / "annotations/instances_val2017.json").read_text())
    names = {category["id"]: category["name"] for category in expected["categories"]}
    folder = tmp_path / "voc"
    (folder / "Annotations").mkdir(parents=True)
    (folder / "JPEGImages").symlink_to(data / "val2017")
    for image in expected["images"]:
        objects = [
            OBJECT.format(x + 1, y + 1, x + w, y + h, name=names[a["category_id"]], extra="")
            for a in expected["annotations"]
            if a["image_id"] == image["id"]
            for x, y, w, h in [a["bbox"]]
        ]
        key = image["file_name"].removesuffix(".jpg")
        (folder / f"Annotations/{key}.xml").write_text(f"<annotation>{''.join(objects)}</annotation>")
    assert convert(folder, capsys)[0] == 0
    actual = coco.read(tmp_path / "out/instances_all.json", folder / "JPEGImages")
    original = coco.read(data / "annotations/instances_val2017.json", data / "val2017")
    boxes = [sorted(map(tuple, split.boxes_xyxy.tolist())) for split in (actual, original)]
    assert boxes[0] == boxes[1]
