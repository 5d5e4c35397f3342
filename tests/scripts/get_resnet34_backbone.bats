#!/usr/bin/env bats

load scripts

setup_file() {
  export mirror=$BATS_FILE_TMPDIR/mirror
  mkdir "$mirror"
  head -c 100000 /dev/urandom >"$mirror/weights"
  name=tiny-$(sha256sum "$mirror/weights" | cut -c 1-8).pth
  mv "$mirror/weights" "$mirror/$name"
  export name
}

setup() {
  folder="$BATS_TEST_TMPDIR/the weights"
}

teardown() {
  stop_serving
  remove_small_disk
}

fetch() {
  BACKBONE_URL=$url/$name run "$repository/get_resnet34_backbone.sh" "$@"
}

@test "the file has its final name and the bytes of the server" {
  serve "$mirror"
  fetch "$folder"
  [ "$status" -eq 0 ]
  cmp "$mirror/$name" "$folder/$name"
  [ "$(ls "$folder")" = "$name" ]
}

@test "PRETRAINED_DIR names the folder if no argument does" {
  serve "$mirror"
  PRETRAINED_DIR=$folder fetch
  [ "$status" -eq 0 ]
  [ -f "$folder/$name" ]
}

@test "a second run sends no request" {
  serve "$mirror"
  fetch "$folder"
  serve "$mirror"
  fetch "$folder"
  [ "$status" -eq 0 ]
  [[ $output == "$folder/$name already exists" ]]
  [ ! -s "$requests" ]
}

@test "a download resumes where the connection broke" {
  serve "$mirror" --cut-after 60000
  fetch "$folder"
  [ "$status" -eq 0 ]
  grep --quiet 'bytes=60000-' "$requests"
  cmp "$mirror/$name" "$folder/$name"
}

@test "a file with a wrong checksum is rejected and removed" {
  serve "$mirror" --corrupt
  fetch "$folder"
  [ "$status" -eq 1 ]
  [[ ${lines[-1]} == "error: $url/$name: the checksum of the downloaded file is wrong"* ]]
  [ -z "$(ls -A "$folder")" ]
}

@test "a truncated file with the final name is rejected" {
  mkdir "$folder"
  head -c 1000 "$mirror/$name" >"$folder/$name"
  url=http://127.0.0.1:9
  fetch "$folder"
  [ "$status" -eq 2 ]
  [[ $output == "error: $folder/$name: its SHA-256 does not begin with "*"Remove it"* ]]
}

@test "a full disk stops the download, and the next run resumes it" {
  small_disk 1
  head -c 1000000 /dev/zero >"$disk/other" # the disk has 1048576 bytes
  serve "$mirror"
  fetch "$disk"
  [ "$status" -eq 1 ]
  [[ ${lines[-1]} == "error: $disk/$name.part: No space left on device. Free some space and run this again"* ]]
  [ ! -e "$disk/$name" ]
  rm "$disk/other"
  fetch "$disk"
  [ "$status" -eq 0 ]
  cmp "$mirror/$name" "$disk/$name"
}

@test "a file name without a checksum is rejected" {
  BACKBONE_URL=http://127.0.0.1:9/resnet34.pth run "$repository/get_resnet34_backbone.sh" "$folder"
  [ "$status" -eq 2 ]
  [[ $output == "error: http://127.0.0.1:9/resnet34.pth: the file name must end in the first 8 digits"* ]]
}

@test "an unknown flag and a second folder are rejected" {
  run "$repository/get_resnet34_backbone.sh" --numpy
  [ "$status" -eq 2 ]
  run "$repository/get_resnet34_backbone.sh" one two
  [ "$status" -eq 2 ]
}

@test "--npz writes every tensor of the state dict with its name" {
  local python=${VENV:-$repository/.venv}/bin/python
  "$repository/setup.sh" --check >/dev/null || skip "needs the environment of ./setup.sh"
  "$python" - "$mirror/state.pth" <<'END'
import sys

import torch

torch.save({"conv1.weight": torch.arange(6.0).reshape(2, 3), "bn1.num_batches_tracked": torch.tensor(7)}, sys.argv[1])
END
  name=state-$(sha256sum "$mirror/state.pth" | cut -c 1-8).pth
  mv "$mirror/state.pth" "$mirror/$name"
  serve "$mirror"
  fetch --npz "$folder"
  [ "$status" -eq 0 ]
  "$python" - "$folder/${name%.pth}.npz" <<'END'
import sys

import numpy as np

weights = np.load(sys.argv[1])
assert weights["conv1.weight"].tolist() == [[0, 1, 2], [3, 4, 5]] and weights["bn1.num_batches_tracked"] == 7
END
  [ ! -e "$folder/${name%.pth}.npz.part" ]
}
