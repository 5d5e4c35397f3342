#!/usr/bin/env bash
# Download COCO 2017, unpack it and shrink its annotations, or download RetinaNet's Open Images. After an interruption,
# run it again: it resumes and skips finished steps.
set -euo pipefail

usage() {
  cat <<'END'
usage: ./init_datasets.sh

environment:
  BENCHMARK          ssd or maskrcnn: COCO 2017; retinanet: the Open Images v6 subset of MLPerf (ssd)
  DATADIR            target folder (data/coco); needs about 40 GiB, of which 20 GiB remain in use
  COCO_URL           mirror that contains zips/ and annotations/ (https://s3.amazonaws.com/images.cocodataset.org)
  KEEP_ARCHIVES      1 keeps the zip files after unpacking (0)

for a mirror of another subset in COCO 2017's layout:
  COCO_TRAIN_IMAGES  images in train2017 (118287)
  COCO_VAL_IMAGES    images in val2017 (5000)
  COCO_MD5           MD5 of annotations_trainval2017.zip, train2017.zip and val2017.zip, in this order

with BENCHMARK=retinanet:
  DATADIR                  target folder (data/openimages); needs about 360 GB
  OPENIMAGES_URL           mirror that contains v5/, v6/ and 2018_04/ (https://storage.googleapis.com/openimages)
  OPENIMAGES_IMAGES_URL    mirror that contains train/ and validation/ (https://open-images-dataset.s3.amazonaws.com)
  OPENIMAGES_MAX_IMAGES    only the first images of each split, for a trial (all)
  OPENIMAGES_WORKERS       images to download at a time (32)
  OPENIMAGES_SKIP_MISSING  1 leaves out images that the server does not have, which MLPerf does not allow (0)
  OPENIMAGES_CLASSES       file of class names, one per line, for another subset (MLPerf's 264)
END
}

script_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib/download.sh
. "$script_dir/scripts/lib/download.sh"

case ${1:-} in
  '') ;;
  -h | --help) usage && exit ;;
  *) die "unknown argument '$1'. Set DATADIR= to name the folder (./init_datasets.sh --help)" 2 ;;
esac

benchmark=${BENCHMARK:-ssd}
case $benchmark in
  ssd | maskrcnn) data=${DATADIR:-$script_dir/data/coco} ;;
  retinanet) data=${DATADIR:-$script_dir/data/openimages} ;;
  *) die "BENCHMARK=$benchmark is unknown. Set it to ssd, maskrcnn or retinanet" 2 ;;
esac
# images.cocodataset.org has no valid HTTPS certificate. The URL of its S3 bucket has one.
mirror=${COCO_URL:-https://s3.amazonaws.com/images.cocodataset.org}
read -r md5_annotations md5_train md5_val \
  <<<"${COCO_MD5:-f4bbac642086de4f52a3fdda2de5fa2c cced6f7f71b7629ddf16f17bbcfab6b2 442b8da7639aecaf257c1dceb8ba8c80}"
declare -A path=([annotations]=annotations/annotations_trainval2017.zip [train2017]=zips/train2017.zip [val2017]=zips/val2017.zip)
declare -A md5=([annotations]=$md5_annotations [train2017]=$md5_train [val2017]=$md5_val)
declare -A images=([train2017]=${COCO_TRAIN_IMAGES:-118287} [val2017]=${COCO_VAL_IMAGES:-5000})

python=${VENV:-$script_dir/.venv}/bin/python
if [[ ! -x $python ]]; then python=python3; fi
"$python" -c '' 2>/dev/null || die "Python 3 is not installed. Debian, Ubuntu: apt-get install python3" 2

mkdir -p "$data" 2>/dev/null && [[ -w $data ]] || die "DATADIR=$data cannot be created or written. Name another folder" 2
exec 9<"$data"
flock --nonblock 9 || die "another init_datasets.sh is running in $data. Wait for it to finish" 2

if [[ $benchmark == retinanet ]]; then
  "$script_dir/setup.sh" --quiet
  data=$(cd "$data" && pwd)
  flags=(--workers "${OPENIMAGES_WORKERS:-32}" --max-images "${OPENIMAGES_MAX_IMAGES:-}")
  if [[ -n ${OPENIMAGES_URL:-} ]]; then flags+=(--annotations-url "$OPENIMAGES_URL"); fi
  if [[ -n ${OPENIMAGES_IMAGES_URL:-} ]]; then flags+=(--images-url "$OPENIMAGES_IMAGES_URL"); fi
  if [[ -n ${OPENIMAGES_CLASSES:-} ]]; then flags+=(--classes "$(realpath "$OPENIMAGES_CLASSES")"); fi
  if [[ ${OPENIMAGES_SKIP_MISSING:-} == 1 ]]; then flags+=(--skip-missing); fi
  cd "$script_dir"
  exec "${VENV:-$script_dir/.venv}/bin/python" -m detection.data.open_images_download "$data" "${flags[@]}"
fi

partial=$data/.partial
rm -rf "$partial"

# is_present PART: succeeds if this part of the data set is complete.
is_present() {
  if [[ $1 == annotations ]]; then
    [[ -f $data/annotations/instances_train2017.json && -f $data/annotations/instances_val2017.json ]]
  else
    [[ -d $data/$1 ]]
  fi
}

# check_disk PART ...: fails if the disk cannot hold both the archives and their contents.
check_disk() {
  local bytes=0 free part length zip
  for part in "$@"; do
    zip=$data/${path[$part]##*/}
    if [[ -f $zip ]]; then
      bytes=$((bytes + $(file_size "$zip")))
      continue
    fi
    length=$(content_length "$mirror/${path[$part]}")
    if [[ -n $length ]]; then bytes=$((bytes + 2 * length - $(file_size "$zip.part"))); fi
  done
  free=$(df --block-size=1 --output=avail "$data" | tail -n 1)
  if ((bytes > free)); then
    die "DATADIR=$data: the archives and their contents need $(numfmt --to=iec "$bytes"), but its disk has $(free_space "$data") free. Free some space or name another folder" 2
  fi
}

# unpack ZIP FOLDER: unpacks to a temporary folder, then renames, so that a folder with the final name is complete.
unpack() {
  local reason
  echo "unpacking $1"
  mkdir "$partial"
  if ! reason=$("$python" -m zipfile -e "$1" "$partial" 2>&1); then
    rm -rf "$partial"
    die "cannot unpack $1: ${reason##*$'\n'}"
  fi
  [[ -d $partial/$2 ]] || die "$1 does not contain a folder $2. Remove it and run this again" 2
  if [[ $2 == annotations ]]; then
    mkdir -p "$data/annotations"
    mv "$partial"/annotations/* "$data/annotations/"
  else
    mv "$partial/$2" "$data/"
  fi
  rm -rf "$partial"
  if [[ ${KEEP_ARCHIVES:-} != 1 ]]; then rm "$1"; fi
}

missing=()
for part in annotations val2017 train2017; do
  if is_present "$part"; then echo "$data/$part already exists"; else missing+=("$part"); fi
done
if ((${#missing[@]})); then check_disk "${missing[@]}"; fi
for part in "${missing[@]}"; do
  zip=$data/${path[$part]##*/}
  if [[ -f $zip ]]; then
    echo "verifying $zip"
    checksum_matches md5sum "${md5[$part]}" "$zip" || die "$zip: its MD5 is not ${md5[$part]}. Remove it and run this again" 2
  else
    download "$mirror/${path[$part]}" "$zip" md5sum "${md5[$part]}"
  fi
  unpack "$zip" "$part"
done

for split in train2017 val2017; do
  expected=${images[$split]}
  num_images=$(find "$data/$split" -type f -name '*.jpg' | wc -l)
  if [[ $num_images != "$expected" ]]; then # no arithmetic, which would run a variable's text
    die "$data/$split contains $num_images images, expected $expected. Remove the folder and run this again" 2
  fi
  full=$data/annotations/instances_$split.json
  shrunk=$data/annotations/bbox_only_instances_$split.json
  if [[ ! $shrunk -nt $full ]]; then
    summary=$("$python" "$script_dir/prepare-json.py" "$full" "$shrunk")
    echo "$summary"
  fi
done
echo "$data: ${images[train2017]} training and ${images[val2017]} validation images are ready"
