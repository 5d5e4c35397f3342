"""Commands of RetinaNet: python -m retinanet COMMAND."""

import sys

from detection import cli
from mlperf import stdio

EXPORT_INTERFACE = """\
    input   images    (B, 3, H, W) uint8 RGB, not resized, padded right and below to the largest of the batch
            sizes_hw  (B, 2) int64, height and width without the padding
    output  boxes     (B, D, 4) float32: left, top, right, bottom in pixels of the image
            labels    (B, D) int64: 1, 2, ... by the categories in the file, 0 without a detection
            scores    (B, D) float32, descending, 0 without a detection
"""

COMMANDS = cli.CommandSet("retinanet", "RetinaNet", (0.3, 4), EXPORT_INTERFACE)

if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(cli.main(sys.argv[1:], COMMANDS))
