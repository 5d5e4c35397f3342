"""Where the pixels of a batch are made: by the worker that read the files, or on the device, of what it is sent.

Both make the same bytes. B images.
"""

from collections.abc import Sequence
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detection.data import image_io
from detection.data.device_resize import CHANNELS, Cuts, Taps, mirrored, side_of, taps
from detection.data.host_cache import DecodedCache


class Original(NamedTuple):
    """An image as it is in its file.

    image: its index in the split. size_hw: in pixels. decoded: (3, H, W) uint8 RGB. encoded: the file's bytes (L,).
    Where both are None, the device has its pixels.
    """

    image: int
    size_hw: tuple[int, int]
    decoded: Tensor | None = None
    encoded: Tensor | None = None


class Part(NamedTuple):
    """A part of an image, and what it becomes.

    box_px: left, top, right and bottom. size_hw: that it is resized to. mirrored: left to right, after that.
    """

    original: Original
    box_px: tuple[int, int, int, int]
    size_hw: tuple[int, int]
    mirrored: bool = False

    def across(self) -> Taps:
        """What its columns are made of, counted from the left of the original."""
        left, _, right, _ = self.box_px
        columns = taps(right - left, self.size_hw[1], start=left)
        return mirrored(columns) if self.mirrored else columns

    def down(self) -> Taps:
        """What its rows are made of, counted from the top of the part."""
        _, top, _, bottom = self.box_px
        return taps(bottom - top, self.size_hw[0])


class Originals(NamedTuple):
    """What the device makes a batch of: images whose pixels it has, then those sent as pixels, then those as files.

    rows: (B,) at which of these the batch has its first image, its second, .... decoded: (P,) uint8, pixels as
    (height, width, 3), one image after another. encoded: (Q,) uint8, one file after another. sent: (F, 4) of each
    image that is sent: its index in the split, height and width, and the length of its file, 0 where it is sent as
    pixels. starts: (B,) where an image begins in the pixels that the device has, or in those that are sent. widths:
    (B,). cuts: of all B.
    """

    rows: Tensor
    decoded: Tensor
    encoded: Tensor
    sent: Tensor
    starts: Tensor
    widths: Tensor
    cuts: Cuts


class Pixels(Protocol):
    """What workers do to images."""

    def read(self, index: int, path: Path) -> Original:
        """Read an image, and decode it where that is the worker's part; raises InputError that names the file."""

    def make(self, part: Part) -> Any:
        """What becomes of a part of it, as far as that is the worker's part."""

    def lay_out(self, made: Sequence[Any], multiple_px: int = 1) -> Any:
        """What was made of the images of a batch, as the batch's images."""


class HostPixels:
    """The worker decodes, cuts out and resizes."""

    def __init__(self, cache: DecodedCache | None = None):
        self.cache = cache

    def read(self, index: int, path: Path) -> Original:
        """Read and decode an image; raises InputError that names the file."""
        decoded = self.cache.read(index, path) if self.cache else image_io.read(path)
        return Original(index, size_of(decoded), decoded=decoded)

    def make(self, part: Part) -> Tensor:
        """What becomes of the part: (3, h, w) uint8."""
        left, top, right, bottom = part.box_px
        assert part.original.decoded is not None
        image = image_io.resize(part.original.decoded[:, top:bottom, left:right], part.size_hw)
        return image.flip(2) if part.mirrored else image

    def lay_out(self, made: Sequence[Tensor], multiple_px: int = 1) -> Tensor:
        """The batch: (B, 3, H, W) uint8, as `images.lay_out` does it."""
        return image_io.lay_out(made, multiple_px)


class DevicePixels:
    """The worker sends what the device lacks, and how to cut and resize it.

    places: (M + 1,) where the place of each of the first M images begins in the device's memory, and where that of the
    last ends. held: (M,) which of them are there; the rank writes it. sizes_hw: (N, 2) of all images, as annotated.
    device_decodes: JPEG files are sent.
    """

    def __init__(
        self,
        places: NDArray[np.int64],
        held: NDArray[np.uint8],
        sizes_hw: NDArray[np.int32],
        *,
        device_decodes: bool,
    ):
        self.places, self.held, self.sizes_hw, self.device_decodes = places, held, sizes_hw, device_decodes

    def read(self, index: int, path: Path) -> Original:
        """Read an image that the device lacks; raises InputError that names the file."""
        if index < len(self.held) and self.held[index]:
            height, width = self.sizes_hw[index].tolist()
            return Original(index, (height, width))
        if not self.device_decodes:
            decoded = image_io.read(path)
            return Original(index, size_of(decoded), decoded=decoded)
        with image_io.naming(path):
            encoded = path.read_bytes()
            if size_hw := image_io.whole_jpeg_hw(encoded):
                return Original(index, size_hw, encoded=torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
            decoded = image_io.decode(encoded)
        return Original(index, size_of(decoded), decoded=decoded)

    def make(self, part: Part) -> Part:
        """The part itself: the device makes something of it."""
        return part

    def lay_out(self, made: Sequence[Part], multiple_px: int = 1) -> Originals:
        """What the device makes the batch of, to be laid out as `images.lay_out` does it."""
        order = sorted(range(len(made)), key=lambda row: way(made[row].original))
        parts = [made[row] for row in order]
        held = [part.original for part in parts if way(part.original) == HELD]
        sent = [part.original for part in parts if way(part.original) != HELD]
        ends = np.cumsum([0, *(CHANNELS * height * width for _, (height, width), *_ in sent)])
        height, width = image_io.common_hw([part.size_hw for part in parts], multiple_px)
        tops, bottoms = ([part.box_px[side] for part in parts] for side in (1, 3))
        return Originals(
            rows=torch.tensor(order).argsort(),
            decoded=joined([one.decoded.permute(1, 2, 0).reshape(-1) for one in sent if one.decoded is not None]),
            encoded=joined([one.encoded for one in sent if one.encoded is not None]),
            sent=torch.tensor(list(starmap(described, sent)), dtype=torch.int64).reshape(-1, 4),
            starts=torch.tensor([*(int(self.places[one.image]) for one in held), *ends[:-1].tolist()]),
            widths=torch.tensor([part.original.size_hw[1] for part in parts]),
            cuts=Cuts(
                torch.tensor(tops),
                torch.arange(max(bottom - top for top, bottom in zip(tops, bottoms, strict=True))),
                side_of([part.across() for part in parts], width),
                side_of([part.down() for part in parts], height),
            ),
        )


HELD, DECODED, ENCODED = range(3)


def way(original: Original) -> int:
    """How the device comes to the pixels of an image."""
    if original.encoded is not None:
        return ENCODED
    return HELD if original.decoded is None else DECODED


def described(image: int, size_hw: tuple[int, int], _: Tensor | None, encoded: Tensor | None) -> tuple[int, ...]:
    """An original as in `Originals.sent`."""
    return image, *size_hw, 0 if encoded is None else len(encoded)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """uint8 tensors (n,) one after another; there may be none."""
    return torch.cat([torch.empty(0, dtype=torch.uint8), *parts])


def size_of(pixels: Tensor) -> tuple[int, int]:
    """Height and width of an image (3, H, W)."""
    return pixels.shape[1], pixels.shape[2]
