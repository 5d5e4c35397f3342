#!/usr/bin/env bash
# Download the ImageNet weights of ResNet-34, SSD300's pretrained backbone: ./get_weights.sh [--npz] resnet34 [FOLDER]
set -euo pipefail

# BACKBONE_URL: another file, whose name ends in the first 8 digits of its SHA-256
exec "$(dirname "${BASH_SOURCE[0]}")/get_weights.sh" "${BACKBONE_URL:-resnet34}" "$@"
