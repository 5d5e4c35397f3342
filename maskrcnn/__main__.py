"""Commands of Mask R-CNN: python -m maskrcnn COMMAND."""

import sys

from detection import cli
from mlperf import stdio

EXPORT_INTERFACE = """\
    input   images    (B, 3, H, W) uint8 RGB, resized (short side 800, long side at most 1333 in MLPerf's settings) and
                      padded right and below to multiples of 32, at least 96, without other preprocessing
            sizes_hw  (B, 2) int64, height and width without the padding
    output  boxes     (B, D, 4) float32: left, top, right, bottom in pixels of the resized image, without the last pixel
                      (width is right - left + 1) except in the torchvision variant
            labels    (B, D) int64: 1, 2, ... by the categories in the file, 0 without a detection
            scores    (B, D) float32, descending, 0 without a detection
            masks     (B, D, 28, 28) float32: probability that a point of the box is inside the object
"""

COMMANDS = cli.CommandSet("maskrcnn", "Mask R-CNN", (0.5, 4), EXPORT_INTERFACE)

if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(cli.main(sys.argv[1:], COMMANDS))
