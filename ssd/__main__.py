"""Commands of SSD300: python -m ssd COMMAND."""

import sys

from detection import cli
from mlperf import stdio

EXPORT_INTERFACE = """\
    input   images  (B, 3, 300, 300) uint8 RGB, the whole image resized, without other preprocessing
    output  boxes   (B, D, 4) float32: left, top, right, bottom as fractions of width and height, not clipped
            labels  (B, D) int64: 1, 2, ... by the categories in the file, 0 without a detection
            scores  (B, D) float32, descending, 0 without a detection
"""

COMMANDS = cli.CommandSet("ssd", "SSD300", (0.3, 8), EXPORT_INTERFACE)

if __name__ == "__main__":
    stdio.ignore_write_errors()
    sys.exit(cli.main(sys.argv[1:], COMMANDS))
