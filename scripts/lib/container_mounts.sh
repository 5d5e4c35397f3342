# shellcheck shell=bash
# Mounts of a container, sourced by run_with_docker.sh and run.sub, which pass them to docker or pyxis.
# The caller defines `die`.

mounts=()          # three words each: source, target, and ro or rw
container_flags=() # flags with file names as the container sees them

# require_dir NAME PATH: prints the absolute path of an existing folder.
require_dir() {
  (cd "$2" 2>/dev/null && pwd) || die "$1=$2 is not a folder"
}

# require_file NAME PATH: prints the absolute path of an existing file.
require_file() {
  [[ -f $2 ]] || die "$1 $2 is not a file"
  realpath --no-symlinks "$2"
}

# add_mount SOURCE TARGET ro|rw: a caller that sets `pyxis` passes the mounts to it, which cannot quote spaces.
add_mount() {
  [[ -z ${pyxis:-} || $1 != *[[:space:]]* ]] || die "$1: pyxis cannot mount a path with a space. Rename it"
  [[ $1 != *[,:]* ]] || die "$1: a path with a comma or a colon cannot be mounted. Rename it"
  mounts+=("$@")
}

# mount_flag FLAG VALUE: mounts the file or folder and appends the flag to `container_flags`.
mount_flag() {
  local source target=/own/${1#--}
  if [[ -z $2 ]]; then
    container_flags+=("$1" "$2")
    return
  fi
  case $1 in
    --train-images | --val-images)
      source=$(require_dir "$1" "$2")
      add_mount "$source" "$target" ro
      ;;
    --summary-json)
      mkdir -p "$(dirname "$2")" || die "$1 $2: cannot create its folder"
      source=$(require_dir "$1" "$(dirname "$2")")
      add_mount "$source" "$target" rw
      target+=/$(basename "$2")
      ;;
    *)
      target+=/$(basename "$2") # keep the name: it is logged, and its suffix tells the file type
      source=$(require_file "$1" "$2")
      add_mount "$source" "$target" ro
      ;;
  esac
  container_flags+=("$1" "$target")
}

# plan_mounts RESULTS DATASET DATA [FLAG ...]: sets `mounts`, `container_flags` and `container_data_dir` (DATADIR there).
# RESULTS: folder of the run folders. DATASET: value of the dataset setting. DATA: its folder.
plan_mounts() {
  local results=$1 dataset=$2 data=$3 pretrained=${PRETRAINED_DIR:-data}
  shift 3
  add_mount "$results" /results rw
  container_data_dir=/data
  if [[ $dataset == toy ]]; then
    # shellcheck disable=SC2034 # read by the caller
    container_data_dir=/tmp/toy # generated in the container
  elif [[ $dataset == synthetic_coco ]]; then
    mkdir -p "$data" || die "cannot create DATADIR=$data"
    data=$(require_dir DATADIR "$data")
    add_mount "$data" /data rw # generated once
  elif [[ " $* " != *' --train-images'[=\ ]* ]]; then
    data=$(require_dir DATADIR "$data")
    add_mount "$data" /data ro
  fi
  if [[ -d $pretrained ]]; then
    pretrained=$(require_dir PRETRAINED_DIR "$pretrained")
    add_mount "$pretrained" /pretrained ro
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
      *) container_flags+=("$1") ;;
    esac
    shift
  done
}
