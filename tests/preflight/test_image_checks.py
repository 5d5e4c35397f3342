import io

import pytest
from PIL import Image

from annotation_file import content, read
from detection.preflight import image_checks


def encode(size, orientation=1, suffix="JPEG"):
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(buffer, suffix, exif=exif)
    return buffer.getvalue()


SIZES = [(100, 50), (64, 48), (300, 200)]  # of `annotation_file.content`


def check(folder, files, **options):
    """Write the images and read their headers."""
    data = content()
    (folder / "train2017").mkdir()
    for image, file in zip(data["images"], files, strict=True):
        (folder / "train2017" / image["file_name"]).write_bytes(file)
    return image_checks.check_headers("train", read(folder, data, **options))


def test_intact_images_pass(tmp_path):
    assert check(tmp_path, map(encode, SIZES)) == ([], [])


def test_orientations_are_counted_with_the_rule(tmp_path):
    files = [encode((50, 100), 6), encode((64, 48), 3), encode((300, 200))]
    info, errors = check(tmp_path, files)
    assert errors == []
    assert info[0] == (
        "train: 2 of 3 images have an EXIF orientation: 1 are read as displayed, 1 as stored (--exif auto)"
    )
    assert info[1].startswith("warning: train: 1 images with an EXIF orientation have the same size")


def test_stored_sizes_need_no_warning(tmp_path):
    info, errors = check(tmp_path, [encode((100, 50), 6), encode((64, 48), 3), encode((300, 200))])
    assert (len(info), errors) == (1, [])
    assert "0 are read as displayed, 2 as stored" in info[0]


def test_all_images_of_another_size_are_counted_and_the_first_is_named(tmp_path):
    _, (error,) = check(tmp_path, [encode(SIZES[0]), *(encode(size[::-1]) for size in SIZES[1:])])
    assert error.startswith(f"{tmp_path}/train2017/000000000010.jpg: 48×64 pixels, but 64×48 in the annotations")
    assert error.endswith("This is the first of 2 such images of 3.")


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "an empty file"),
        (b"<html><body>404", "an HTML page, perhaps of a failed download"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3\n",
            "a pointer of Git LFS (run git lfs pull)",
        ),
        (b"\0" * 3000, "a file of zeros, perhaps of an interrupted download"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b"%PDF-1.7", "a PDF document"),
        (b"no image", "unknown image format"),
    ],
)
def test_files_that_are_not_images_are_named(tmp_path, file, reason):
    _, errors = check(tmp_path, [encode(SIZES[0]), file, encode(SIZES[2])])
    assert errors == [f"{tmp_path}/train2017/000000000010.jpg: this image cannot be read ({reason}). Replace the file."]


def test_too_many_pixels_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    _, (error,) = check(tmp_path, map(encode, SIZES))
    assert "000000000030.jpg: more than 40,000 pixels, possibly a decompression bomb" in error
