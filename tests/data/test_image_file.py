"""Pixels of images with an EXIF orientation, from every decoder and both image pipelines."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from detection.config.settings import InputError
from detection.data import coco, image_io, pillow_io
from detection.data.device_cache import DeviceImageCache
from detection.data.host_cache import HostImageCache
from detection.data.image_file import ImageFile, strip_app1
from detection.data.image_pipeline import HostImagePipeline
from detection.runtime.distributed import DistContext

STORED_HW, DISPLAYED_HW = (30, 41), (41, 30)
COLOR = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)).resize(STORED_HW[::-1])
SINGLE_RANK = DistContext(0, 1, torch.device("cpu"))
OPTIONS = {"jpg": {"quality": 95}, "png": {}, "webp": {"lossless": True}, "tif": {}}
SUFFIXES = sorted(OPTIONS)


def write(path, orientation):
    """Write an image with an EXIF orientation. Return its stored and its displayed pixels (3, H, W)."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    COLOR.save(path, exif=exif, **OPTIONS[path.suffix[1:]])
    COLOR.save(path.with_stem("plain"), **OPTIONS[path.suffix[1:]])
    with Image.open(path.with_stem("plain")) as plain:
        pixels = plain.convert("RGB")
    image = pixels.copy()
    image.getexif()[0x0112] = orientation
    return [torch.from_numpy(np.array(each)).permute(2, 0, 1) for each in (pixels, ImageOps.exif_transpose(image))]


def read_everywhere(file):
    """Return the pixels from both decoders, the reader without torch, and the host's and the device's pipeline."""
    yield image_io.read(*file)
    encoded = file.path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_io, "decode", image_io.decode_with_pillow)
        yield image_io.decode_file(encoded, file)
    yield torch.from_numpy(pillow_io.read_pixels(file)).permute(2, 0, 1)
    if file.size_hw is None:
        return  # the pipelines read images of a split, which have a size
    sizes_hw = np.array([file.size_hw], dtype=np.int32)
    for _ in range(2):  # the second reading comes from the cache
        cached = HostImagePipeline(HostImageCache(sizes_hw, 2**20, SINGLE_RANK)).read(0, file)
        assert cached.size_hw == tuple(cached.decoded.shape[1:])
        yield cached.decoded
    for device_decodes in (False, True):
        cache = DeviceImageCache(
            sizes_hw, 2**20, lambda _: file.path, SINGLE_RANK.device, device_decodes=device_decodes, compiled=False
        )
        source = cache.pipeline.read(0, file)
        yield source.decoded if source.encoded is None else image_io.decode(source.encoded.numpy().tobytes())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_decoder_returns_the_pixels_that_the_rule_selects(tmp_path, suffix, orientation):
    path = tmp_path / f"a.{suffix}"
    stored, displayed = write(path, orientation)
    swapped = orientation >= 5
    for size_hw, exif, expected in [
        (STORED_HW, "auto", stored),
        (STORED_HW, "ignore", stored),
        (None, "ignore", stored),
        (None, "apply", displayed),
        (DISPLAYED_HW if swapped else STORED_HW, "apply", displayed),
        (DISPLAYED_HW if swapped else STORED_HW, "auto", displayed if swapped else stored),
    ]:
        for pixels in read_everywhere(ImageFile(path, size_hw, exif)):
            assert torch.equal(pixels, expected)
    assert torch.equal(torch.from_numpy(np.array(pillow_io.read(path).image)).permute(2, 0, 1), displayed)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("orientation", "size_hw", "exif", "message"),
    [
        (1, (41, 30), "auto", "41×30 pixels, but 30×41 in the annotations. Width and height are swapped: correct the"),
        (6, (41, 30), "ignore", "or pass --exif auto if the file has an EXIF orientation"),
        (6, (30, 41), "apply", "30×41 pixels, but 41×30 in the annotations"),
        (3, (60, 82), "auto", "The boxes are of a copy scaled by 2: scale width, height and boxes, or resize"),
        (1, (15, 20), "auto", "The boxes are of a copy scaled by 0.4878"),
        (8, (30, 50), "auto", "41×30 pixels, but 50×30 in the annotations. Check that the annotations belong to this"),
    ],
)
def test_another_size_than_annotated_is_an_error_with_its_cause(tmp_path, suffix, orientation, size_hw, exif, message):
    path = tmp_path / f"a.{suffix}"
    write(path, orientation)
    if orientation == 8:
        message = message.replace("41×30", "30×41")
    file = ImageFile(path, size_hw, exif)
    for read in (lambda: image_io.read(*file), lambda: pillow_io.read_pixels(file)):
        with pytest.raises(InputError) as caught:
            read()
        assert str(caught.value).startswith(f"{path}: ")
        assert message in str(caught.value)


def test_jpeg_without_app1_keeps_everything_else(tmp_path):
    path = tmp_path / "a.jpg"
    write(path, 6)
    stripped, size_hw = strip_app1(path.read_bytes())
    assert size_hw == STORED_HW
    assert b"Exif" in path.read_bytes()
    assert b"Exif" not in stripped
    with Image.open(io.BytesIO(stripped)) as image, Image.open(path) as original:
        assert np.array_equal(image, original)
        assert image.info["jfif"] == original.info["jfif"]
    assert strip_app1(stripped) == (stripped, STORED_HW)
    for damaged in (stripped[:5], b"\xff\xd8\xff", b"\xff\xd8" + b"\xff" * 9, stripped.replace(b"\xff", b"\0")):
        assert strip_app1(damaged)[0] == damaged


def test_orientation_in_xmp_is_treated_alike(tmp_path):
    path = tmp_path / "a.jpg"
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    COLOR.save(path, xmp=xmp, quality=95)
    COLOR.save(tmp_path / "plain.jpg", quality=95)
    expected = image_io.read(tmp_path / "plain.jpg").rot90(-1, (1, 2))
    for pixels in read_everywhere(ImageFile(path, DISPLAYED_HW)):
        assert torch.equal(pixels, expected)


def test_corrupt_exif_data_counts_as_none(tmp_path):
    path = tmp_path / "a.jpg"
    COLOR.save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01", quality=95)
    stored = image_io.read(path)
    for exif in ("auto", "ignore", "apply"):
        for pixels in read_everywhere(ImageFile(path, None, exif)):
            assert torch.equal(pixels, stored)


@pytest.mark.parametrize("annotated", ["stored", "displayed"])
def test_boxes_stay_on_their_objects(tmp_path, annotated):
    displayed = Image.new("RGB", (120, 200), "gray")
    displayed.paste("red", (10, 20, 50, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = displayed.transpose(Image.Transpose.ROTATE_90)  # a viewer turns it back
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95)
    (width, height), box = {
        "displayed": ((120, 200), [10, 20, 40, 40]),
        "stored": ((200, 120), [20, 120 - 50, 40, 40]),
    }[annotated]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": width, "height": height}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 1600, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "red"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    split = coco.read(tmp_path / "a.json", tmp_path)
    left, top, right, bottom = split.boxes(0)[0].astype(int)
    for pixels in read_everywhere(split.image_file(0)):
        inside = pixels[:, top:bottom, left:right].float().mean(dim=(1, 2))
        assert inside[0] > 240
        assert inside[1:].max() < 15
        assert pixels[0].float().sub(pixels[1]).gt(100).sum() == pytest.approx(1600, rel=0.02)
