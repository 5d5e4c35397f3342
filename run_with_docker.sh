#!/usr/bin/env bash
# Runs the benchmark NEXP times, each in a fresh container, with a log for each.
set -euo pipefail

usage() {
  cat <<'END'
usage: CONT=image [NAME=value ...] ./run_with_docker.sh [flags of run_and_time.sh]

environment:
  CONT            image, made by: docker build -t detection .
  DGXSYSTEM       system, config_${DGXSYSTEM}.sh is its file (toy)
  DATADIR         data set (what the config file says)
  PRETRAINED_DIR  folder of the backbone weights (data)
  LOGDIR          where logs and run folders go (results)
  NEXP            experiments (5)
  CLEAR_CACHES    1 drops the machine's file caches before each experiment, as MLPerf asks; 0 does not (1)
  DATESTAMP       beginning of the logs' names, DATESTAMP_1.log to DATESTAMP_NEXP.log (now)
  DOCKER          docker or podman (the first there is)

exit status: that of the first experiment that failed, 0 when all reached the target
END
}

die() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then usage && exit; fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export DGXSYSTEM=${DGXSYSTEM:-toy}
config=$here/config_$DGXSYSTEM.sh
[[ -f $config ]] ||
  die "DGXSYSTEM=$DGXSYSTEM: there is no config_$DGXSYSTEM.sh. There are: $(cd "$here" && printf '%s ' config_*.sh)"
[[ -n ${CONT:-} ]] || die "CONT names no image. Make one (docker build -t detection .) and name it: CONT=detection $0"
[[ ${NEXP:=5} =~ ^[1-9][0-9]*$ ]] || die "NEXP=$NEXP is no number of experiments"
# shellcheck source=/dev/null
. "$config"
((${DGXNNODES:-1} == 1)) || die "config_$DGXSYSTEM.sh is for $DGXNNODES nodes: containers are started on one only"

docker=${DOCKER:-$(command -v docker || command -v podman || true)}
[[ -n $docker ]] || die "neither docker nor podman is on PATH. Install one, or run without: ./run_and_time.sh"
"$docker" image inspect "$CONT" >/dev/null 2>&1 ||
  die "$docker has no image $CONT, or is not running ('$docker image inspect $CONT' says which)"

# folder NAME PATH: the absolute path of a folder that is there.
folder() {
  (cd "$2" 2>/dev/null && pwd) || die "$1=$2 is no folder"
}

# What the config file names by a relative path is beside this script.
cd "$here"
log_dir=${LOGDIR:-results}
mkdir -p "$log_dir" || die "LOGDIR=$log_dir cannot be made"
log_dir=$(folder LOGDIR "$log_dir")
options=(
  --rm --init --ipc=host --ulimit memlock=-1 --ulimit stack=67108864
  --user "$(id -u):$(id -g)"
  --mount "type=bind,source=$log_dir,target=/results"
  --env LOGDIR=/results --env DGXSYSTEM --env DGXNGPU
)
if [[ $("$docker" --version) == podman* ]]; then options+=(--userns=keep-id); fi
if [[ ${SSD_DATASET:-} == toy ]]; then
  options+=(--env DATADIR=/tmp/toy) # drawn in the container
else
  data=$(folder DATADIR "${DATADIR:-data/coco}")
  options+=(--mount "type=bind,source=$data,target=/data,readonly" --env DATADIR=/data)
fi
pretrained=${PRETRAINED_DIR:-data}
if [[ -d $pretrained ]]; then
  pretrained=$(folder PRETRAINED_DIR "$pretrained")
  options+=(--mount "type=bind,source=$pretrained,target=/pretrained,readonly" --env PRETRAINED_DIR=/pretrained)
fi
if [[ -e /dev/nvidiactl ]]; then
  if [[ ${options[*]} == *keep-id* ]]; then options+=(--device nvidia.com/gpu=all); else options+=(--gpus all); fi
elif [[ -e /dev/kfd ]]; then
  options+=(--device /dev/kfd --device /dev/dri --group-add video)
fi

# A container may not drop the machine's caches, so it is told whether they were.
clear_caches() {
  sync
  if [[ -w /proc/sys/vm/drop_caches ]]; then
    echo 3 >/proc/sys/vm/drop_caches
  else
    sudo -n /sbin/sysctl vm.drop_caches=3 >/dev/null 2>&1
  fi
}

stamp=${DATESTAMP:-$(date +%Y-%m-%d_%H-%M-%S)}
status=0
for ((i = 1; i <= NEXP; i++)); do
  log=$log_dir/${stamp}_$i.log
  cleared=0
  if [[ ${CLEAR_CACHES:-1} == 1 ]]; then
    if clear_caches; then
      cleared=1
    else
      echo "run_with_docker.sh: the caches could not be dropped (needs root, or sudo without a password); CLEAR_CACHES=0 ends this line"
    fi
  fi
  echo "run_with_docker.sh: experiment $i of $NEXP, log in $log"
  result=0
  "$docker" run "${options[@]}" --env CACHES_CLEARED=$cleared --env EXPERIMENT=$((i - 1)) \
    "$CONT" ./run_and_time.sh "$@" 2>&1 | tee "$log" || result=$?
  if ((status == 0)); then status=$result; fi
  # Bad configuration would be so every time; a run below the target is one of the results.
  if ((result == 2 || result > 3)); then break; fi
done
exit "$status"
