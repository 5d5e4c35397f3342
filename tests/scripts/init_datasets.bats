#!/usr/bin/env bats

load scripts

# A data set in COCO's layout, in three zip files: 3 training images and 2 validation images.
setup_file() {
  load scripts
  export mirror=$BATS_FILE_TMPDIR/mirror
  "$(any_python)" - "$mirror" <<'END'
import json
import random
import sys
import zipfile
from pathlib import Path

mirror = Path(sys.argv[1])
(mirror / "zips").mkdir(parents=True)
(mirror / "annotations").mkdir()
random_bytes = random.Random(0).randbytes
counts = {"train": 3, "val": 2}
for split, count in counts.items():
    with zipfile.ZipFile(mirror / f"zips/{split}2017.zip", "w") as archive:
        archive.writestr(f"{split}2017/", b"")
        for i in range(count):
            archive.writestr(f"{split}2017/{i:012}.jpg", random_bytes(50_000))
with zipfile.ZipFile(mirror / "annotations/annotations_trainval2017.zip", "w") as archive:
    for split, count in counts.items():
        data = {
            "images": [{"id": i, "file_name": f"{i:012}.jpg", "width": 9, "height": 9} for i in range(count)],
            "annotations": [
                {"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 9.5, "iscrowd": 0,
                 "segmentation": [[1, 1, 5, 1, 5, 5]]}
            ],
            "categories": [{"id": 1, "name": "disc"}],
        }
        archive.writestr(f"annotations/instances_{split}2017.json", json.dumps(data))
END
  COCO_MD5=$(md5sum "$mirror"/annotations/*.zip "$mirror"/zips/train2017.zip "$mirror"/zips/val2017.zip | cut -c 1-32 | xargs)
  export COCO_MD5 COCO_TRAIN_IMAGES=3 COCO_VAL_IMAGES=2
}

setup() {
  export DATADIR="$BATS_TEST_TMPDIR/data set/coco"
}

teardown() {
  stop_serving
  remove_small_disk
}

fetch() {
  COCO_URL=$url run "$repository/init_datasets.sh"
}

@test "one run leaves images, annotations and shrunken annotations, and removes the archives" {
  serve "$mirror"
  fetch
  [ "$status" -eq 0 ]
  [[ ${lines[-1]} == *"3 training and 2 validation images"* ]]
  [ "$(find "$DATADIR" -name '*.jpg' | wc -l)" -eq 5 ]
  [ -f "$DATADIR/annotations/bbox_only_instances_train2017.json" ]
  [ -f "$DATADIR/annotations/bbox_only_instances_val2017.json" ]
  [ -z "$(find "$DATADIR" -name '*.zip' -o -name '*.part' -o -name '.partial')" ]
  [[ $(<"$DATADIR/annotations/bbox_only_instances_train2017.json") == *'"area":9.5'* ]]
}

@test "output that cannot be written ends no download" {
  serve "$mirror"
  for redirection in '>/dev/full' '| true'; do
    rm -rf "$DATADIR"
    COCO_URL=$url run bash -c "'$repository/init_datasets.sh' 2>&1 $redirection; exit \${PIPESTATUS[0]}"
    [ "$status" -eq 0 ]
    [ -f "$DATADIR/annotations/bbox_only_instances_val2017.json" ]
  done
}

@test "a second run sends no request" {
  serve "$mirror"
  fetch
  serve "$mirror"
  fetch
  [ "$status" -eq 0 ]
  [ ! -s "$requests" ]
}

@test "KEEP_ARCHIVES=1 keeps the zip files" {
  serve "$mirror"
  KEEP_ARCHIVES=1 fetch
  [ "$status" -eq 0 ]
  [ "$(find "$DATADIR" -name '*.zip' | wc -l)" -eq 3 ]
}

@test "a download resumes after every broken connection" {
  serve "$mirror" --cut-after 60000
  fetch
  [ "$status" -eq 0 ]
  [ "$(requests_for 'GET /zips/train2017.zip')" -eq 3 ]
  grep --quiet 'GET /zips/train2017.zip bytes=120000-' "$requests"
}

@test "a killed run resumes from the bytes it has" {
  mkdir -p "$DATADIR"
  head -c 70000 "$mirror/zips/train2017.zip" >"$DATADIR/train2017.zip.part"
  serve "$mirror"
  fetch
  [ "$status" -eq 0 ]
  grep --quiet 'GET /zips/train2017.zip bytes=70000-' "$requests"
}

@test "a complete part is only verified and renamed" {
  mkdir -p "$DATADIR"
  cp "$mirror/zips/train2017.zip" "$DATADIR/train2017.zip.part"
  serve "$mirror"
  fetch
  [ "$status" -eq 0 ]
  [ "$(find "$DATADIR/train2017" -name '*.jpg' | wc -l)" -eq 3 ]
}

@test "a server without range support sends the whole file again" {
  mkdir -p "$DATADIR"
  head -c 70000 "$mirror/zips/val2017.zip" >"$DATADIR/val2017.zip.part"
  serve "$mirror" --no-range
  fetch
  [ "$status" -eq 0 ]
}

@test "a file with a wrong checksum is removed, and the next run downloads it again" {
  serve "$mirror" --corrupt
  fetch
  [ "$status" -eq 1 ]
  [[ ${lines[-1]} == "error: "*"annotations_trainval2017.zip: the md5sum of the downloaded file does not begin with"* ]]
  [ -z "$(ls -A "$DATADIR")" ]
  serve "$mirror"
  fetch
  [ "$status" -eq 0 ]
}

@test "an interrupted unpacking is repeated" {
  serve "$mirror"
  KEEP_ARCHIVES=1 fetch
  mkdir -p "$DATADIR/.partial/train2017"
  mv "$DATADIR/train2017/000000000000.jpg" "$DATADIR/.partial/train2017/"
  rm -r "$DATADIR/train2017"
  serve "$mirror"
  fetch
  [ "$status" -eq 0 ]
  [ "$(find "$DATADIR/train2017" -name '*.jpg' | wc -l)" -eq 3 ]
  [ ! -e "$DATADIR/.partial" ]
  [ ! -s "$requests" ]
}

@test "an image folder with missing images is rejected" {
  serve "$mirror"
  fetch
  rm "$DATADIR/train2017/000000000001.jpg"
  fetch
  [ "$status" -eq 2 ]
  [[ ${lines[-1]} == "error: $DATADIR/train2017 contains 2 images, expected 3."* ]]
  COCO_TRAIN_IMAGES="a[\$(touch "$BATS_TEST_TMPDIR/pwned")]" fetch
  [[ $status -eq 2 && ! -e $BATS_TEST_TMPDIR/pwned ]]
}

@test "a disk that is too small is reported before the download starts" {
  small_disk 1
  head -c 600000 /dev/zero >"$disk/other"
  serve "$mirror"
  DATADIR=$disk/coco fetch
  [ "$status" -eq 2 ]
  [[ ${lines[-1]} == "error: DATADIR=$disk/coco: the archives and their contents need "*"its disk has "* ]]
  [ "$(requests_for GET)" -eq 0 ]
}

@test "a disk that fills up stops the download, and the next run finishes it" {
  small_disk 1
  DATADIR=$disk/coco
  mkdir "$DATADIR"
  serve "$mirror"
  # The mirror does not report file sizes, so the disk check cannot detect the problem in advance.
  mkdir "$BATS_TEST_TMPDIR/bin"
  printf '#!/bin/sh\ncase " $* " in *" --head "*) exit 22 ;; esac\nexec %s "$@"\n' "$(command -v curl)" >"$BATS_TEST_TMPDIR/bin/curl"
  chmod +x "$BATS_TEST_TMPDIR/bin/curl"
  head -c 800000 /dev/zero >"$disk/other"
  PATH=$BATS_TEST_TMPDIR/bin:$PATH fetch
  [ "$status" -eq 1 ]
  [[ ${lines[-1]} == "error: cannot "*"$DATADIR/"* ]]
  [ ! -e "$DATADIR/train2017" ]
  rm "$disk/other"
  fetch
  [ "$status" -eq 0 ]
}

@test "a missing file is reported with the server's status" {
  serve "$mirror" --status 404
  fetch
  [ "$status" -eq 1 ]
  [[ ${lines[-1]} == "error: $url/annotations/annotations_trainval2017.zip: the server returned status 404" ]]
}

@test "an unreachable server fails with a hint" {
  url=http://127.0.0.1:9
  fetch
  [ "$status" -eq 1 ]
  [[ ${lines[-1]} == "error: "*"download failed, curl's exit status is 7. Run this again"* ]]
}

@test "a second concurrent call is rejected" {
  mkdir -p "$DATADIR"
  exec 8<"$DATADIR"
  flock 8
  url=http://127.0.0.1:9
  fetch
  exec 8<&-
  [ "$status" -eq 2 ]
  [[ $output == "error: another init_datasets.sh is running in $DATADIR"* ]]
}

# open_images FOLDER: writes a mirror of Open Images with a class and an image of each split.
open_images() {
  "$(any_python)" - "$1" <<'END'
import sys
from pathlib import Path

from PIL import Image

from detection.data.open_images_download import CLASS_NAMES, SOURCES

root = Path(sys.argv[1])
files = {CLASS_NAMES: "/m/cat,Cat\n"}
columns = "ImageID,LabelName,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
for split, sources in SOURCES.items():
    files[sources.image_ids] = "ImageID\n0123456789abcdef\n"
    files[sources.boxes] = f"{columns}\n0123456789abcdef,/m/cat,0.25,0.75,0,1,0,0,1,0,0\n"
    (root / split).mkdir(parents=True)
    Image.new("RGB", (8, 6)).save(root / split / "0123456789abcdef.jpg")
for name, text in files.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
END
  echo Cat >"$1/names.txt"
}

@test "BENCHMARK=retinanet downloads Open Images, and a second run sends no request" {
  "$repository/setup.sh" --check >/dev/null || skip "needs the environment of ./setup.sh"
  open_images "$BATS_TEST_TMPDIR/open images"
  cd "$BATS_TEST_TMPDIR"
  serve "open images"
  export BENCHMARK=retinanet OPENIMAGES_URL=$url OPENIMAGES_IMAGES_URL=$url OPENIMAGES_MAX_IMAGES=5
  export OPENIMAGES_CLASSES="open images/names.txt" OPENIMAGES_WORKERS=2
  DATADIR="open set" run "$repository/init_datasets.sh"
  [ "$status" -eq 0 ]
  [[ ${lines[-2]} == "$PWD/open set/train/labels/openimages-mlperf.json: 1 images, 1 boxes, 1 classes" ]]
  [[ ${lines[-1]} == "$PWD/open set/train/labels/openimages-mlperf.npz: 1 images, 1 boxes" ]]
  grep --quiet '"bbox":\[2.0,0.0,4.0,6.0\],"area":24.0,"iscrowd":1' "open set/train/labels/openimages-mlperf.json"
  cmp "open images/train/0123456789abcdef.jpg" "open set/train/data/0123456789abcdef.jpg"
  : >"$requests"
  DATADIR="open set" run "$repository/init_datasets.sh"
  [ "$status" -eq 0 ]
  [ ! -s "$requests" ]
  rm -r "open images/train" "open set/train/data"
  DATADIR="open set" run "$repository/init_datasets.sh"
  [ "$status" -eq 1 ]
  [[ ${lines[-1]} == "error: $url/train: 1 of 1 images are missing: 0123456789abcdef."* ]]
}

@test "an unknown BENCHMARK is rejected" {
  BENCHMARK=yolo run "$repository/init_datasets.sh"
  [ "$status" -eq 2 ]
  [[ $output == "error: BENCHMARK=yolo is unknown."* ]]
}

@test "an argument is rejected" {
  run "$repository/init_datasets.sh" --fast
  [ "$status" -eq 2 ]
  [[ $output == "error: unknown argument '--fast'"* ]]
}
