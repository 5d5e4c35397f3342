import json

import pytest
from PIL import Image

from detection.data import coco, voc_to_coco
from paths import shared

OBJECT = """<object><name>{name}</name><pose>Left</pose>{extra}<bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax>
<ymax>{3}</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"""


@pytest.fixture
def folder(tmp_path):
    """Three pictures of 100×50: two to train on, one to evaluate."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / "voc" / name).mkdir(parents=True)
    put(tmp_path / "voc", "000001", ("dog", (1, 1, 100, 50), ""), ("cat", (11, 21, 30, 40), "<difficult>1</difficult>"))
    put(tmp_path / "voc", "000002")
    put(tmp_path / "voc", "a name", ("bird", (0, 0, 120.5, 10), "<difficult>0</difficult>"))
    sets = tmp_path / "voc/ImageSets/Main"
    (sets / "train.txt").write_text("000001\n000002\n")
    (sets / "val.txt").write_text("a name -1\n\n")
    (sets / "dog_train.txt").write_text("000001  1\n")
    return tmp_path / "voc"


def put(folder, key, *things, size="<size><width>100</width><height>50</height></size>"):
    objects = "".join(OBJECT.format(*box, name=name, extra=extra) for name, box, extra in things)
    name = f"<filename>{key}.jpg</filename>"
    (folder / f"Annotations/{key}.xml").write_text(f"<annotation>{name}{size}{objects}</annotation>")
    Image.new("RGB", (100, 50)).save(folder / f"JPEGImages/{key}.jpg")


def convert(folder, capsys):
    status = voc_to_coco.main([str(folder), str(folder.parent / "out")])
    return status, *capsys.readouterr()


def test_boxes_that_count_from_1_and_include_their_last_pixel_become_coco(folder, capsys):
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


def test_what_is_written_is_read_as_training_data(folder, capsys):
    convert(folder, capsys)
    split = coco.read(folder.parent / "out/instances_train.json", folder / "JPEGImages")
    assert (len(split), split.num_classes, split.crowd.tolist()) == (2, 4, [False, True])
    assert (split.dropped_boxes, split.clipped_boxes) == (0, 0)


def test_a_folder_without_lists_is_one_set(folder, capsys):
    for path in (folder / "ImageSets/Main").iterdir():
        path.unlink()
    assert convert(folder, capsys)[0] == 0
    assert len(json.loads((folder.parent / "out/instances_all.json").read_text())["images"]) == 3


def test_a_picture_is_found_by_the_name_of_its_annotation_and_measured_where_that_is_silent(folder, capsys):
    put(folder, "000002", ("dog", (1, 1, 5, 5), ""), size="<size><width>0</width></size>")
    (folder / "JPEGImages/000002.jpg").rename(folder / "JPEGImages/000002.PNG")
    assert convert(folder, capsys)[0] == 0
    images = json.loads((folder.parent / "out/instances_train.json").read_text())["images"]
    assert (images[1]["file_name"], images[1]["width"], images[1]["height"]) == ("000002.PNG", 100, 50)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("<annotation>", "broken XML"),
        ("<?xml version='1.0' encoding='nonsense'?><annotation/>", "broken XML"),
        ("<annotation><object><name>dog</name></object></annotation>", "bndbox/xmin is '', not a number"),
        (f"<annotation>{OBJECT.format('x', 1, 2, 3, name='a', extra='')}</annotation>", "bndbox/xmin is 'x'"),
        (f"<annotation>{OBJECT.format('nan', 1, 2, 3, name='a', extra='')}</annotation>", "bndbox/xmin is 'nan'"),
        (f"<annotation>{OBJECT.format(9, 1, 2, 3, name='a', extra='')}</annotation>", "has no pixel"),
        (f"<annotation>{OBJECT.format(1, 1, 2, 3, name='', extra='')}</annotation>", "an object has no name"),
        ("<annotation><size><width>50</width><height>100</height></size></annotation>", "the size is 50×100"),
    ],
)
def test_a_broken_annotation_is_named_and_nothing_is_written(folder, capsys, broken, message):
    (folder / "Annotations/000002.xml").write_text(broken)
    status, _, err = convert(folder, capsys)
    assert status == 2
    assert message in err
    assert str(folder / "Annotations/000002.xml") in err
    assert not (folder.parent / "out").exists()


def test_what_is_not_there_is_named(folder, capsys, tmp_path):
    (folder / "JPEGImages/000001.jpg").unlink()
    (folder / "Annotations/a name.xml").unlink()
    status, _, err = convert(folder, capsys)
    assert status == 2
    assert "000001.xml: its picture, 000001.*, is not in JPEGImages/" in err
    assert "a name.xml: cannot be read (No such file" in err
    assert voc_to_coco.main([str(tmp_path / "absent"), str(tmp_path / "out")]) == 2
    assert "there is no folder JPEGImages/" in capsys.readouterr().err


@pytest.mark.data
def test_the_real_boxes_of_a_voc_data_set_agree_with_their_conversion_by_others(tmp_path, capsys):
    """BCCD was published as VOC and is here as COCO: written as VOC again, it converts to what it was."""
    data = shared("data/bccd")
    wanted = json.loads((data / "annotations/instances_val2017.json").read_text())
    names = {category["id"]: category["name"] for category in wanted["categories"]}
    folder = tmp_path / "voc"
    (folder / "Annotations").mkdir(parents=True)
    (folder / "JPEGImages").symlink_to(data / "val2017")
    for image in wanted["images"]:
        things = [
            OBJECT.format(x + 1, y + 1, x + w, y + h, name=names[a["category_id"]], extra="")
            for a in wanted["annotations"]
            if a["image_id"] == image["id"]
            for x, y, w, h in [a["bbox"]]
        ]
        key = image["file_name"].removesuffix(".jpg")
        (folder / f"Annotations/{key}.xml").write_text(f"<annotation>{''.join(things)}</annotation>")
    assert convert(folder, capsys)[0] == 0
    one = coco.read(tmp_path / "out/instances_all.json", folder / "JPEGImages")
    other = coco.read(data / "annotations/instances_val2017.json", data / "val2017")
    boxes = [sorted(map(tuple, split.boxes_xyxy.tolist())) for split in (one, other)]
    assert boxes[0] == boxes[1]
