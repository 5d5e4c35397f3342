import numpy as np
import pytest
from fontTools.ttLib import TTFont
from PIL import Image

from detection.evaluation import fonts, visualize
from detection.evaluation.visualize import Annotation

NAMES = [
    *("café ñandú", "зубная щётка", "αντικείμενο", "红绿灯", "自転車", "자전거", "قطة صغيرة", "חתול", "कुत्ता", "ลูกแมว"),
    *("বিড়াল", "பூனை", "పిల్లి", "ಬೆಕ್ಕು", "പൂച്ച", "બિલાડી", "ਬਿੱਲੀ", "පූසා", "ကြောင်", "ឆ្មា", "ແມວ", "ድመት"),
    *("կատու", "კატა", "🐈", "Ж自"),
]


@pytest.mark.parametrize("name", NAMES)
def test_every_script_has_a_font_with_its_characters(name):
    parts = fonts.split_by_font(f"{name} 0.93", 20)
    assert "".join(text for text, _ in parts) == f"{name} 0.93"
    assert len(parts) <= 2
    for text, font in parts:
        characters = TTFont(font.path, fontNumber=0, lazy=True).getBestCmap()
        assert {ord(character) for character in text} <= set(characters)


def test_spaces_stay_between_the_words():
    """The text of right-to-left script ends at its left, where a trailing space would be invisible."""
    parts = fonts.split_by_font("חתול  0.93", 20)
    assert [text for text, _ in parts] == ["חתול", "  0.93"]


def test_ascii_needs_no_font_files(monkeypatch):
    monkeypatch.setattr(fonts, "find_font", None)
    assert [text for text, _ in fonts.split_by_font("traffic\nlight 0.93", 20)] == ["traffic light 0.93"]


def test_a_character_without_a_font_is_drawn_as_a_frame(monkeypatch):
    monkeypatch.setattr(fonts, "system_font_files", tuple)
    fonts.find_font.cache_clear()
    parts = fonts.split_by_font("\U0010fffd", 20)
    assert [text for text, _ in parts] == ["\U0010fffd"]
    fonts.find_font.cache_clear()


def test_text_of_several_fonts_is_inside_its_label():
    image, annotation = Image.new("RGB", (600, 400), "white"), Annotation((50, 100, 500, 300), 1, "gj ဒီ 红")
    assert len(fonts.split_by_font(annotation.text, 14)) == 3
    pixels = np.asarray(visualize.draw_annotations(image, [annotation]))[:97]  # above the box
    rows, columns = np.nonzero((pixels < 255).any(axis=-1))
    label = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert (np.concatenate([label[0], label[:, 0], label[:, -1]]) == 0).all(), "the frame"
    is_text = (label[1:, 1:-1] < 60).all(axis=-1)
    assert not is_text[0].any()
    assert not is_text[:, [0, -1]].any()
    assert is_text.any(axis=0).sum() > 20
