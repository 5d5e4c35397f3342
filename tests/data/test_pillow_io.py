import numpy as np
import pytest
from PIL import Image

from detection.config.settings import InputError
from detection.data import pillow_io

GREY = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (48, 1))
COLOUR = np.stack([GREY, GREY[:, ::-1], np.tile(np.arange(48, dtype=np.uint8)[:, None] * 4, 64)], axis=-1)


def save(path, image, **options):
    image.save(path, **options)
    return pillow_io.read(path)


def pixels(picture):
    return np.asarray(picture.image).astype(int)


@pytest.mark.parametrize(
    ("mode", "name", "tolerance"),
    [("RGB", "a.png", 0), ("RGB", "a.jpg", 12), ("RGB", "a.bmp", 0), ("RGB", "a.tiff", 0), ("CMYK", "a.jpg", 12),
     ("CMYK", "a.tiff", 1), ("P", "a.gif", 30), ("RGBA", "a.png", 0), ("RGBA", "a.webp", 30), ("YCbCr", "a.jpg", 12)],
)  # fmt: skip
def test_every_mode_of_colour_is_read_as_what_it_shows(tmp_path, mode, name, tolerance):
    image = Image.fromarray(COLOUR)
    picture = save(tmp_path / name, image.quantize(256) if mode == "P" else image.convert(mode))
    assert picture.image.mode == "RGB"
    assert np.abs(pixels(picture) - COLOUR).max() <= tolerance


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (GREY, "a.png"),
        (GREY.astype(np.uint16) * 257, "a.png"),
        (GREY.astype(np.uint16) * 257, "a.tiff"),
        (GREY.astype(np.int32) * 100_000, "a.tiff"),
        (GREY.astype(np.float32) / 255, "a.tiff"),
        (GREY.astype(np.float32) * 1000 - 7, "a.tiff"),
    ],
)
def test_grey_of_any_depth_keeps_its_shades(tmp_path, values, name):
    picture = save(tmp_path / name, Image.fromarray(values))
    assert np.abs(pixels(picture) - GREY[..., None]).max() <= 1


def test_a_picture_of_one_value_is_no_division_by_zero(tmp_path):
    picture = save(tmp_path / "a.tiff", Image.fromarray(np.full((4, 4), 3.5, np.float32)))
    assert pixels(picture).max() == 0


def test_a_dim_16_bit_picture_is_not_brightened(tmp_path):
    picture = save(tmp_path / "a.png", Image.fromarray(GREY.astype(np.uint16) * 100))
    assert abs(pixels(picture).max() - round(255 * 100 / 257)) <= 1


def test_black_and_white_is_read(tmp_path):
    picture = save(tmp_path / "a.png", Image.fromarray(GREY).convert("1", dither=Image.Dither.NONE))
    assert (pixels(picture)[..., 0] == np.where(GREY >= 128, 255, 0)).all()


def test_transparent_parts_are_laid_on_white(tmp_path):
    seen = np.where(np.arange(64)[None, :, None] < 32, COLOUR, 255)
    hidden = Image.fromarray(COLOUR)
    hidden.putalpha(Image.fromarray(np.tile(np.where(np.arange(64) < 32, 255, 0).astype(np.uint8), (48, 1))))
    assert np.abs(pixels(save(tmp_path / "a.png", hidden)) - seen).max() <= 1
    grey = save(tmp_path / "b.png", hidden.convert("LA"))
    assert grey.mode == "LA"
    assert (pixels(grey)[:, 32:] == 255).all()
    by_palette = save(tmp_path / "c.png", Image.fromarray(GREY).convert("P"), transparency=0)
    assert (pixels(by_palette)[:, 0] == 255).all()
    assert pixels(by_palette)[0, 1].max() < 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_shows_the_picture_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = [None, 0, 3, 1, 5, 2, 6, 4][orientation - 1]  # undone by the viewer, as the standard's table says
    stored = Image.fromarray(COLOUR)
    if turn is not None:
        stored = stored.transpose(Image.Transpose(turn))
    picture = save(tmp_path / "a.png", stored, exif=exif)
    assert picture.image.size == (64, 48)
    assert (pixels(picture) == COLOUR).all()


def test_a_broken_exif_does_not_cost_the_picture(tmp_path):
    picture = save(tmp_path / "a.png", Image.fromarray(COLOUR), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    assert (pixels(picture) == COLOUR).all()


def test_the_first_frame_of_several_is_taken(tmp_path):
    first, second = Image.fromarray(COLOUR), Image.new("RGB", (64, 48), "red")
    for name in ("a.tiff", "a.png"):
        picture = save(tmp_path / name, first, save_all=True, append_images=[second])
        assert picture.frames == 2
        assert (pixels(picture) == COLOUR).all()


def test_broken_pictures_are_named(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((200, 200), 90).save(whole)
    contents = {
        "cut.jpg": whole.read_bytes()[:3000],
        "text.jpg": b"hello",
        "empty.png": b"",
        "head.png": b"\x89PNG\r\n\x1a\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in (*contents, "absent.jpg"):
        with pytest.raises(InputError, match=rf"{name}: this picture cannot be read \(.+\)"):
            pillow_io.read(tmp_path / name)


def test_a_decompression_bomb_is_refused_and_what_is_merely_large_is_not(tmp_path, monkeypatch):
    Image.new("1", (3000, 1000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(InputError, match=r"bomb.png: more than 2,000,000 pixels"):
        pillow_io.read(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000_000)  # Pillow warns between once and twice its limit
    assert pillow_io.read(tmp_path / "bomb.png").image.size == (3000, 1000)


def test_a_folder_stands_for_its_pictures_and_each_is_named_once(tmp_path):
    for name in ("b.png", "a.JPG"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    found = pillow_io.find([tmp_path / "b.png", tmp_path, tmp_path / "absent.png"])
    assert [path.name for path in found] == ["b.png", "a.JPG", "absent.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no picture is in this folder"):
        pillow_io.find([tmp_path / "empty"])
