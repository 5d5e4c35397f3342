import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from detection.data import image_io, pillow_io

COLOR = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def drop_transparency(encoded):
    """Stand in for torchcodec's decoder, which returns the colors below transparent parts."""
    return torch.zeros(3, 12, 16, dtype=torch.uint8)


@pytest.mark.parametrize("has_torchcodec", [True, False])
@pytest.mark.parametrize(
    ("mode", "name"), [("RGBA", "a.png"), ("LA", "a.png"), ("P", "a.png"), ("RGBA", "a.webp"), ("P", "a.gif")]
)
def test_transparent_parts_are_white_as_in_predict(tmp_path, monkeypatch, has_torchcodec, mode, name):
    fake = SimpleNamespace(decode_image=drop_transparency) if has_torchcodec else None
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", fake)
    monkeypatch.setattr(image_io, "decode", image_io.select_decoder())
    image = Image.fromarray(COLOR)
    if mode == "P":
        image = image.quantize(8)
        image.save(tmp_path / name, transparency=0)
    else:
        image.putalpha(Image.fromarray(np.tile(np.uint8([0, 128]).repeat(8), (12, 1))))
        image.convert(mode).save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
    pixels = image_io.read(tmp_path / name).permute(1, 2, 0).numpy()
    assert np.array_equal(pixels, np.asarray(pillow_io.read(tmp_path / name).image))
    assert (pixels == 255).all(axis=2).any()


@pytest.mark.parametrize("has_torchcodec", [True, False])
def test_torchcodec_decodes_jpeg(tmp_path, monkeypatch, has_torchcodec):
    fake = SimpleNamespace(decode_image=drop_transparency) if has_torchcodec else None
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", fake)
    Image.fromarray(COLOR).save(tmp_path / "a.jpg")
    decoded = image_io.select_decoder()((tmp_path / "a.jpg").read_bytes())
    assert (decoded == 0).all() == has_torchcodec
