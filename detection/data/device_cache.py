"""Decoded images kept in the memory of the device, and batches made of them there.

B images.
"""

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detection.config.run_config import RunConfig
from detection.config.settings import InputError
from detection.data import host_cache, image_io
from detection.data.batch import Share
from detection.data.coco import Split
from detection.data.device_resize import CHANNELS, Cuts, of_images, resampler, side_of, taps
from detection.data.host_cache import GIB
from detection.data.image_pipeline import DevicePixels, HostPixels, Originals, Pixels
from detection.data.prefetch import move
from detection.runtime import device
from detection.runtime.distributed import Ranks

# Of the memory that is free once a step was made: what is left is for larger batches of boxes, and evaluation.
SHARE_OF_FREE = 0.75
# Beyond these a pixel's place takes more than 32 bits, and code is compiled anew.
MANY_PIXELS = 2**31


class DeviceCache:
    """The training images of a rank in its device's memory, filled as they come.

    Each image has a place of its own, after those before it, as long as the limit allows; what lies beyond is sent
    each time. The rank says in `worker.held` what has come, and its workers, which must be forked after this is made,
    send that no more. All is done on the device's current stream.
    """

    def __init__(
        self,
        sizes_hw: NDArray[np.int32],
        limit_bytes: int,
        image_path: Callable[[int], Path],
        on: torch.device,
        *,
        device_decodes: bool,
        compiled: bool,
    ):
        """sizes_hw: (N, 2) pixels of all images, as the annotation file says. image_path: of an image by its index."""
        ends = np.cumsum(CHANNELS * sizes_hw.astype(np.int64).prod(axis=1))
        count = int(np.searchsorted(ends, limit_bytes, side="right"))
        places = np.concatenate([[0], ends[:count]])
        self.image_path = image_path
        self.pixels = torch.empty(int(places[-1]), dtype=torch.uint8, device=on)
        device.synchronize(on)  # other streams may use it from now on
        held = np.frombuffer(mmap.mmap(-1, count + 1), dtype=np.uint8)[:count]
        self.worker = DevicePixels(places, held, sizes_hw, device_decodes=device_decodes)
        self.resample = resampler(compiled=compiled)

    def images(self, originals: Originals) -> Tensor:
        """The batch as (B, 3, H, W) uint8 on the device, channels last; raises InputError that names a file."""
        needed = originals.rows, originals.decoded, originals.starts, originals.widths, originals.cuts
        rows, decoded, starts, widths, cuts = move(needed, self.pixels.device)
        files = self.decode(originals)
        sent = torch.cat([decoded, *(image.permute(1, 2, 0).reshape(-1) for image in files)])
        self.keep(sent, originals.sent)
        num_held = len(originals.rows) - len(originals.sent)
        of_held, of_sent = slice(0, num_held), slice(num_held, None)
        made = [
            self.resample(pixels, starts[part], widths[part], of_images(cuts, part))
            for pixels, part, count in ((self.pixels, of_held, num_held), (sent, of_sent, len(originals.sent)))
            if count
        ]
        return torch.cat(made).permute(0, 2, 3, 1)[rows].permute(0, 3, 1, 2)

    def decode(self, originals: Originals) -> list[Tensor]:
        """The images that are sent as files: (3, H, W) uint8 each, on the device."""
        sent = [(index, length) for index, _, _, length in originals.sent.tolist() if length]
        if not sent:
            return []
        files = originals.encoded.split([length for _, length in sent])
        try:
            return image_io.decode_there(files, self.pixels.device)
        except RuntimeError:  # of which file it does not say, and the CPU may know what to make of it
            decoded = []
            for (index, _), file in zip(sent, files, strict=True):
                with image_io.naming(self.image_path(index)):
                    decoded.append(image_io.decode(file.numpy().tobytes()).to(self.pixels.device))
            return decoded

    def keep(self, pixels: Tensor, sent: Tensor) -> None:
        """Keep those of the images in `pixels` (P,) that have a place; sent: as in `Originals`."""
        start, worker = 0, self.worker
        for index, height, width, _ in sent.tolist():
            stop = start + CHANNELS * height * width
            # Where the annotation file is wrong about its size, there is no place for it.
            if index < len(worker.held) and (height, width) == tuple(worker.sizes_hw[index]):
                self.pixels[worker.places[index] : worker.places[index + 1]] = pixels[start:stop]
                worker.held[index] = 1
            start = stop


def check(config: RunConfig, on: torch.device) -> None:
    """Raise InputError where the settings ask the device for what it does not have."""
    if config.image_cache == "device":
        if on.type == "cpu":
            raise InputError("--image-cache device: this run computes on the CPU, whose memory is called host.")
        if not config.image_cache_gib and device.free_memory_bytes(on) is None:
            raise InputError("--image-cache device: torch cannot tell how much is free. Pass --image-cache-gib.")
    if config.jpeg_decoder == "gpu":
        if not device.decodes_jpeg(on):
            raise InputError(f"--jpeg-decoder gpu: {device.describe(on)} has no decoder that torchcodec can use.")
        try:
            import torchcodec.decoders  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:
            raise InputError(f"--jpeg-decoder gpu: torchcodec cannot be loaded ({error}).") from error


def make(config: RunConfig, split: Split, ranks: Ranks) -> tuple[Pixels, DeviceCache | None]:
    """What the workers do to the training images, as the settings say; and what the rank does, if it does anything."""
    if not config.images_on_device:
        return HostPixels(host_cache.make(config, split.sizes_hw, ranks)), None
    cache = DeviceCache(
        split.sizes_hw,
        limit_bytes(config, ranks.device),
        split.image_path,
        ranks.device,
        device_decodes=config.jpeg_decoder == "gpu",
        compiled=device.compiles(config.compile, ranks.device),
    )
    return cache.worker, cache


def limit_bytes(config: RunConfig, on: torch.device) -> int:
    """The memory of the device that images may be kept in."""
    if config.image_cache != "device":
        return 0
    return int(config.image_cache_gib * GIB) or int(SHARE_OF_FREE * (device.free_memory_bytes(on) or 0))


def shares(of_workers: Iterator[Share[Any]], cache: DeviceCache | None) -> Iterator[Share[Any]]:
    """Shares whose images the device makes, where it does."""
    if cache is None:
        yield from of_workers
        return
    for share in of_workers:
        yield share._replace(batch=share.batch._replace(images=cache.images(share.batch.images)))


def warm_up(config: RunConfig, ranks: Ranks, size_hw: tuple[int, int]) -> None:
    """Compile what makes images of about this size, before the clock starts, where the device makes them."""
    if not config.images_on_device:
        return
    count, (height, width) = config.batch_size, size_hw
    zeros, rows = torch.zeros(count, dtype=torch.int64), torch.arange(height)
    across, down = (side_of([taps(side, side)] * count, side) for side in (width, height))
    there = move((zeros, zeros + width, Cuts(zeros, rows, across, down)), ranks.device)
    for size in (CHANNELS * height * width, MANY_PIXELS):
        if size < MANY_PIXELS or limit_bytes(config, ranks.device) >= MANY_PIXELS:
            pixels = torch.zeros(size, dtype=torch.uint8, device=ranks.device)
            resampler(compiled=device.compiles(config.compile, ranks.device))(pixels, *there)
