import numpy as np
import pytest

from detection.data.missing_files import describe_missing


@pytest.mark.parametrize(
    ("name", "cause", "existing"),
    [
        ("train/p1.jpg", "another folder", "p1.jpg"),
        ("/data/img/p1.jpg", "another folder", "p1.jpg"),
        ("C:\\\\data\\p1.jpg", "backslashes and another folder", "p1.jpg"),
        (".\\p1.jpg", "backslashes", "p1.jpg"),
        ("P1.JPG", "another case", "p1.jpg"),
        ("p1.png", "another suffix", "p1.jpg"),
        ("p1", "another suffix", "p1.jpg"),
        ("a%20b.jpg", "escapes such as %20", "a b.jpg"),
        ("deep.jpg", "another folder", "more/deep.jpg"),
        ("other/deep.jpg", "another folder", "more/deep.jpg"),
        ("more\\deep.jpg", "backslashes", "more/deep.jpg"),
    ],
)
def test_a_name_that_differs_from_a_file_is_diagnosed(tmp_path, name, cause, existing):
    (tmp_path / "images/more").mkdir(parents=True)
    for file in ("p1.jpg", "a b.jpg", "more/deep.jpg"):
        (tmp_path / "images" / file).touch()
    message = describe_missing(["p1.jpg", name], np.array([True, False]), tmp_path / "images")
    assert message == (
        f"1 of its 2 images are not in images/, but 1 with {cause}: `{name}` exists as `{existing}`. "
        "Correct 'file_name' in the annotations"
    )


def test_unknown_names_are_counted(tmp_path):
    message = describe_missing(["a.jpg", "b.jpg"], np.array([False, False]), tmp_path)
    assert f"2 of its 2 images are not in {tmp_path.name}/ (first: a.jpg)" in message
    assert "--skip-missing-images" in message
    assert "init_datasets" not in message
