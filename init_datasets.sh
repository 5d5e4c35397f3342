#!/usr/bin/env bash
# Downloads COCO 2017, unpacks it and shrinks its annotations. Run it again after a break: it goes on where it
# stopped, and a finished step is not repeated.
set -euo pipefail

usage() {
  cat <<'END'
usage: ./init_datasets.sh

environment:
  DATADIR            where the data goes (data/coco); takes about 40 GiB, 20 GiB when done
  COCO_URL           a mirror with zips/ and annotations/ under it (https://s3.amazonaws.com/images.cocodataset.org)
  KEEP_ARCHIVES      1 keeps the zip files, which are removed once unpacked otherwise

for a mirror of another subset in COCO 2017's layout:
  COCO_TRAIN_IMAGES  images in train2017 (118287)
  COCO_VAL_IMAGES    images in val2017 (5000)
  COCO_MD5           MD5 of annotations_trainval2017.zip, train2017.zip and val2017.zip, in this order
END
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib/download.sh
. "$here/download.sh"

case ${1:-} in
  '') ;;
  -h | --help) usage && exit ;;
  *) die "init_datasets.sh takes no argument '$1'; DATADIR= names the folder (./init_datasets.sh --help)" 2 ;;
esac

data=${DATADIR:-$here/data/coco}
# The host's own name has no certificate for HTTPS; the same bucket by its path has.
mirror=${COCO_URL:-https://s3.amazonaws.com/images.cocodataset.org}
read -r md5_annotations md5_train md5_val \
  <<<"${COCO_MD5:-f4bbac642086de4f52a3fdda2de5fa2c cced6f7f71b7629ddf16f17bbcfab6b2 442b8da7639aecaf257c1dceb8ba8c80}"
declare -A path=([annotations]=annotations/annotations_trainval2017.zip [train2017]=zips/train2017.zip [val2017]=zips/val2017.zip)
declare -A md5=([annotations]=$md5_annotations [train2017]=$md5_train [val2017]=$md5_val)
declare -A images=([train2017]=${COCO_TRAIN_IMAGES:-118287} [val2017]=${COCO_VAL_IMAGES:-5000})

python=${VENV:-$here/.venv}/bin/python
if [[ ! -x $python ]]; then python=python3; fi
"$python" -c '' 2>/dev/null || die "this needs Python 3 to unpack. Debian, Ubuntu: apt-get install python3" 2

mkdir -p "$data" 2>/dev/null && [[ -w $data ]] || die "DATADIR=$data cannot be made or written; name another folder" 2
exec 9<"$data"
flock --nonblock 9 || die "another init_datasets.sh is at work in $data" 2
partial=$data/.partial
rm -rf "$partial"

there() {
  if [[ $1 == annotations ]]; then
    [[ -f $data/annotations/instances_train2017.json && -f $data/annotations/instances_val2017.json ]]
  else
    [[ -d $data/$1 ]]
  fi
}

# Refuses to begin where the disk cannot hold the archives and, beside them, what is in them.
check_disk() {
  local bytes=0 free part length zip
  for part in "$@"; do
    zip=$data/${path[$part]##*/}
    if [[ -f $zip ]]; then
      bytes=$((bytes + $(size "$zip")))
      continue
    fi
    length=$(content_length "$mirror/${path[$part]}")
    if [[ -n $length ]]; then bytes=$((bytes + 2 * length - $(size "$zip.part"))); fi
  done
  free=$(df --block-size=1 --output=avail "$data" | tail -n 1)
  if ((bytes > free)); then
    die "DATADIR=$data: this needs $(numfmt --to=iec "$bytes") for archives and what is in them, its disk has $(free_space "$data") free. Make room, or name another folder" 2
  fi
}

# unpack ZIP FOLDER: beside the target first, so that what is under its own name is whole.
unpack() {
  local reason
  echo "unpacking $1"
  mkdir "$partial"
  if ! reason=$("$python" -m zipfile -e "$1" "$partial" 2>&1); then
    rm -rf "$partial"
    die "cannot unpack $1: ${reason##*$'\n'}"
  fi
  [[ -d $partial/$2 ]] || die "$1 holds no folder $2" 2
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
  if there "$part"; then echo "$data/$part is there"; else missing+=("$part"); fi
done
if ((${#missing[@]})); then check_disk "${missing[@]}"; fi
for part in "${missing[@]}"; do
  zip=$data/${path[$part]##*/}
  if [[ -f $zip ]]; then
    echo "checking $zip"
    has_sum md5sum "${md5[$part]}" "$zip" || die "$zip: its MD5 is not ${md5[$part]}. Remove it and run this again" 2
  else
    download "$mirror/${path[$part]}" "$zip" md5sum "${md5[$part]}"
  fi
  unpack "$zip" "$part"
done

for split in train2017 val2017; do
  expected=${images[$split]}
  found=$(find "$data/$split" -type f -name '*.jpg' | wc -l)
  if ((found != expected)); then
    die "$data/$split holds $found images, not $expected. Remove that folder and run this again" 2
  fi
  full=$data/annotations/instances_$split.json
  shrunk=$data/annotations/bbox_only_instances_$split.json
  if [[ ! $shrunk -nt $full ]]; then "$python" "$here/prepare-json.py" "$full" "$shrunk"; fi
done
echo "$data: ${images[train2017]} training and ${images[val2017]} validation images, ready"
