#!/usr/bin/env bash
# Download the ImageNet weights of ResNet-34, SSD300's pretrained backbone. A second call does nothing.
set -euo pipefail

usage() {
  cat <<'END'
usage: ./get_resnet34_backbone.sh [--npz] [FOLDER]

  --npz   also write the weights as a NumPy archive (.npz)
  FOLDER  target folder (PRETRAINED_DIR, else data)

environment:
  BACKBONE_URL  URL of the file (https://download.pytorch.org/models/resnet34-333f7ec4.pth);
                the file name must end in the first 8 digits of its SHA-256
END
}

script_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib/download.sh
. "$script_dir/scripts/lib/download.sh"

npz=false folder=''
for argument in "$@"; do
  case $argument in
    --npz) npz=true ;;
    -h | --help) usage && exit ;;
    -*) die "unknown argument '$argument'. See ./get_resnet34_backbone.sh --help" 2 ;;
    *)
      [[ -z $folder ]] || die "two folders given, $folder and $argument. Name one" 2
      folder=$argument
      ;;
  esac
done
folder=${folder:-${PRETRAINED_DIR:-$script_dir/data}}

url=${BACKBONE_URL:-https://download.pytorch.org/models/resnet34-333f7ec4.pth}
file=$folder/${url##*/}
[[ $file =~ -([0-9a-f]{8})\.pth$ ]] ||
  die "BACKBONE_URL=$url: the file name must end in the first 8 digits of its SHA-256, as in resnet34-333f7ec4.pth" 2
sum=${BASH_REMATCH[1]}

mkdir -p "$folder" 2>/dev/null && [[ -w $folder ]] || die "$folder cannot be created or written. Name another folder" 2
exec 9<"$folder"
flock --nonblock 9 || die "another get_resnet34_backbone.sh is running in $folder. Wait for it to finish" 2

if [[ -f $file ]]; then
  checksum_matches sha256sum "$sum" "$file" || die "$file: its SHA-256 does not begin with $sum. Remove it and run this again" 2
  echo "$file already exists"
else
  download "$url" "$file" sha256sum "$sum"
  echo "$file is ready"
fi

archive=${file%.pth}.npz
if $npz && [[ ! -f $archive ]]; then
  "$script_dir/setup.sh" --quiet
  "${VENV:-$script_dir/.venv}/bin/python" - "$file" "$archive.part" <<'END'
import sys

import numpy as np
import torch

weights = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
with open(sys.argv[2], "wb") as archive:
    np.savez(archive, **{name: tensor.numpy() for name, tensor in weights.items()})
END
  mv "$archive.part" "$archive"
fi
if $npz; then echo "$archive is ready"; fi
