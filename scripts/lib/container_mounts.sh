# shellcheck shell=bash
# What a container sees of this machine: sourced by run_with_docker.sh and run.sub, which hand it to docker or pyxis.
# The caller has `die`, and check_series of scripts/lib/experiments.sh.

mounts=() # source, target, and ro or rw: three words each
inside=() # the flags, with the names that files have in there

# folder NAME PATH: the absolute path of a folder that is there.
folder() {
  (cd "$2" 2>/dev/null && pwd) || die "$1=$2 is no folder"
}

# file NAME PATH: the absolute path of a file that is there.
file() {
  [[ -f $2 ]] || die "$1 $2 is no file"
  realpath --no-symlinks "$2"
}

# mount SOURCE TARGET ro|rw
mount() {
  [[ $1 != *[,:]* ]] || die "$1: a name with a comma or a colon cannot be mounted. Give it another"
  mounts+=("$@")
}

# mount_flag FLAG VALUE: appends them to `inside` as they are in there.
mount_flag() {
  local source target=/own/${1#--}
  if [[ -z $2 ]]; then
    inside+=("$1" "$2")
    return
  fi
  case $1 in
    --train-images | --val-images)
      source=$(folder "$1" "$2")
      mount "$source" "$target" ro
      ;;
    --summary-json)
      mkdir -p "$(dirname "$2")" || die "$1 $2: its folder cannot be made"
      source=$(folder "$1" "$(dirname "$2")")
      mount "$source" "$target" rw
      target+=/$(basename "$2")
      ;;
    *)
      target+=/$(basename "$2") # the name is shown and logged, and says what kind of file it is
      source=$(file "$1" "$2")
      mount "$source" "$target" ro
      ;;
  esac
  inside+=("$1" "$target")
}

# plan_mounts RESULTS DATASET DATA [FLAG ...]: sets `mounts`, `inside`, and `data_inside`, the DATADIR in there.
# RESULTS: folder of the run folders. DATASET: its name in the recipe. DATA: its folder.
plan_mounts() {
  local results=$1 dataset=$2 data=$3 pretrained=${PRETRAINED_DIR:-data}
  shift 3
  mount "$results" /results rw
  data_inside=/data
  if [[ $dataset == toy ]]; then
    # shellcheck disable=SC2034 # read by the caller
    data_inside=/tmp/toy # drawn in the container
  elif [[ $dataset == synthetic_coco ]]; then
    mkdir -p "$data" || die "DATADIR=$data cannot be made"
    data=$(folder DATADIR "$data")
    mount "$data" /data rw # drawn once
  elif ! value_of --train-images "$@" >/dev/null; then
    data=$(folder DATADIR "$data")
    mount "$data" /data ro
  fi
  if [[ -d $pretrained ]]; then
    pretrained=$(folder PRETRAINED_DIR "$pretrained")
    mount "$pretrained" /pretrained ro
  fi
  while (($#)); do
    case $1 in
      --train-images=* | --train-annotations=* | --val-images=* | --val-annotations=* | --weights=* | \
        --pretrained-backbone=* | --summary-json=*)
        mount_flag "${1%%=*}" "${1#*=}"
        ;;
      --train-images | --train-annotations | --val-images | --val-annotations | --weights | --pretrained-backbone | --summary-json)
        (($# > 1)) || die "$1 needs a value"
        mount_flag "$1" "$2"
        shift
        ;;
      *) inside+=("$1") ;;
    esac
    shift
  done
}
