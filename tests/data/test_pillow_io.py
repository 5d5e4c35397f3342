import numpy as np
import pytest
from PIL import Image

from detection.config.settings import InputError
from detection.data import pillow_io

GRAY = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (48, 1))
COLOR = np.stack([GRAY, GRAY[:, ::-1], np.tile(np.arange(48, dtype=np.uint8)[:, None] * 4, 64)], axis=-1)


def save_and_read(path, image, **options):
    image.save(path, **options)
    return pillow_io.read(path)


def pixels(user_image):
    return np.asarray(user_image.image).astype(int)


@pytest.mark.parametrize(
    ("mode", "name", "tolerance"),
    [("RGB", "a.png", 0), ("RGB", "a.jpg", 12), ("RGB", "a.bmp", 0), ("RGB", "a.tiff", 0), ("CMYK", "a.jpg", 12),
     ("CMYK", "a.tiff", 1), ("P", "a.gif", 30), ("RGBA", "a.png", 0), ("RGBA", "a.webp", 30), ("YCbCr", "a.jpg", 12)],
)  # fmt: skip
def test_every_color_mode_is_converted_to_rgb(tmp_path, mode, name, tolerance):
    image = Image.fromarray(COLOR)
    user_image = save_and_read(tmp_path / name, image.quantize(256) if mode == "P" else image.convert(mode))
    assert user_image.image.mode == "RGB"
    assert np.abs(pixels(user_image) - COLOR).max() <= tolerance


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (GRAY, "a.png"),
        (GRAY.astype(np.uint16) * 257, "a.png"),
        (GRAY.astype(np.uint16) * 257, "a.tiff"),
        (GRAY.astype(np.int32) * 100_000, "a.tiff"),
        (GRAY.astype(np.float32) / 255, "a.tiff"),
        (GRAY.astype(np.float32) * 1000 - 7, "a.tiff"),
    ],
)
def test_grayscale_of_any_depth_keeps_its_shades(tmp_path, values, name):
    user_image = save_and_read(tmp_path / name, Image.fromarray(values))
    assert np.abs(pixels(user_image) - GRAY[..., None]).max() <= 1


def test_image_with_a_single_value_does_not_divide_by_zero(tmp_path):
    user_image = save_and_read(tmp_path / "a.tiff", Image.fromarray(np.full((4, 4), 3.5, np.float32)))
    assert pixels(user_image).max() == 0


def test_dark_16_bit_image_is_not_brightened(tmp_path):
    user_image = save_and_read(tmp_path / "a.png", Image.fromarray(GRAY.astype(np.uint16) * 100))
    assert abs(pixels(user_image).max() - round(255 * 100 / 257)) <= 1


def test_black_and_white_image_is_read(tmp_path):
    user_image = save_and_read(tmp_path / "a.png", Image.fromarray(GRAY).convert("1", dither=Image.Dither.NONE))
    assert (pixels(user_image)[..., 0] == np.where(GRAY >= 128, 255, 0)).all()


def test_transparent_parts_become_white(tmp_path):
    expected = np.where(np.arange(64)[None, :, None] < 32, COLOR, 255)
    transparent = Image.fromarray(COLOR)
    transparent.putalpha(Image.fromarray(np.tile(np.where(np.arange(64) < 32, 255, 0).astype(np.uint8), (48, 1))))
    assert np.abs(pixels(save_and_read(tmp_path / "a.png", transparent)) - expected).max() <= 1
    gray = save_and_read(tmp_path / "b.png", transparent.convert("LA"))
    assert gray.mode == "LA"
    assert (pixels(gray)[:, 32:] == 255).all()
    palette = save_and_read(tmp_path / "c.png", Image.fromarray(GRAY).convert("P"), transparency=0)
    assert (pixels(palette)[:, 0] == 255).all()
    assert pixels(palette)[0, 1].max() < 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_yields_an_upright_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = [None, 0, 3, 1, 5, 2, 6, 4][orientation - 1]  # the inverse of each orientation in the EXIF standard
    stored = Image.fromarray(COLOR)
    if turn is not None:
        stored = stored.transpose(Image.Transpose(turn))
    user_image = save_and_read(tmp_path / "a.png", stored, exif=exif)
    assert user_image.image.size == (64, 48)
    assert (pixels(user_image) == COLOR).all()


def test_corrupt_exif_data_is_ignored(tmp_path):
    user_image = save_and_read(tmp_path / "a.png", Image.fromarray(COLOR), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    assert (pixels(user_image) == COLOR).all()


def test_first_of_several_frames_is_used(tmp_path):
    first, second = Image.fromarray(COLOR), Image.new("RGB", (64, 48), "red")
    for name in ("a.tiff", "a.png"):
        user_image = save_and_read(tmp_path / name, first, save_all=True, append_images=[second])
        assert user_image.num_frames == 2
        assert (pixels(user_image) == COLOR).all()


def test_error_names_a_corrupt_image(tmp_path):
    complete = tmp_path / "complete.jpg"
    Image.effect_noise((200, 200), 90).save(complete)
    contents = {
        "cut.jpg": complete.read_bytes()[:3000],
        "text.jpg": b"hello",
        "empty.png": b"",
        "head.png": b"\x89PNG\r\n\x1a\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in (*contents, "absent.jpg"):
        with pytest.raises(InputError, match=rf"{name}: this image cannot be read \(.+\)"):
            pillow_io.read(tmp_path / name)


def test_decompression_bomb_is_an_error_and_a_large_image_is_not(tmp_path, monkeypatch):
    Image.new("1", (3000, 1000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(InputError, match=r"bomb.png: more than 2,000,000 pixels"):
        pillow_io.read(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000_000)  # Pillow warns between once and twice its limit
    assert pillow_io.read(tmp_path / "bomb.png").image.size == (3000, 1000)


def test_expand_paths_lists_the_images_of_a_folder_without_duplicates(tmp_path):
    for name in ("b.png", "a.JPG"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    paths, _ = pillow_io.expand_paths([tmp_path / "b.png", tmp_path, tmp_path / "absent.png"])
    assert [path.name for path in paths] == ["b.png", "a.JPG", "absent.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image in this folder"):
        pillow_io.expand_paths([tmp_path / "empty"])
