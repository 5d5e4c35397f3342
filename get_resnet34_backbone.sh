#!/usr/bin/env bash
# Downloads the ImageNet weights of ResNet-34 that the benchmark starts from. A second call does nothing.
set -euo pipefail

usage() {
  cat <<'END'
usage: ./get_resnet34_backbone.sh [--npz] [FOLDER]

  --npz   also write the weights as a NumPy archive (.npz)
  FOLDER  where the file goes (PRETRAINED_DIR, else data)

environment:
  BACKBONE_URL  the file on a mirror (https://download.pytorch.org/models/resnet34-333f7ec4.pth);
                its name ends in the first 8 digits of its SHA-256
END
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib/download.sh
. "$here/download.sh"

npz=false folder=''
for argument in "$@"; do
  case $argument in
    --npz) npz=true ;;
    -h | --help) usage && exit ;;
    -*) die "get_resnet34_backbone.sh knows no argument '$argument' (./get_resnet34_backbone.sh --help)" 2 ;;
    *)
      [[ -z $folder ]] || die "two folders named: $folder and $argument" 2
      folder=$argument
      ;;
  esac
done
folder=${folder:-${PRETRAINED_DIR:-$here/data}}

url=${BACKBONE_URL:-https://download.pytorch.org/models/resnet34-333f7ec4.pth}
file=$folder/${url##*/}
[[ $file =~ -([0-9a-f]{8})\.pth$ ]] ||
  die "BACKBONE_URL=$url: the name must end in the first 8 digits of its SHA-256, as in resnet34-333f7ec4.pth" 2
sum=${BASH_REMATCH[1]}

mkdir -p "$folder" 2>/dev/null && [[ -w $folder ]] || die "$folder cannot be made or written; name another folder" 2
exec 9<"$folder"
flock --nonblock 9 || die "another get_resnet34_backbone.sh is at work in $folder" 2

if [[ -f $file ]]; then
  has_sum sha256sum "$sum" "$file" || die "$file: its SHA-256 does not begin with $sum. Remove it and run this again" 2
  echo "$file is there"
else
  download "$url" "$file" sha256sum "$sum"
  echo "$file is ready"
fi

archive=${file%.pth}.npz
if $npz && [[ ! -f $archive ]]; then
  "$here/setup.sh" --quiet
  "${VENV:-$here/.venv}/bin/python" - "$file" "$archive.part" <<'END'
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
