#!/usr/bin/env bash
# Runs the benchmark NEXP times, each in a fresh container, with a log for each.
set -euo pipefail

usage() {
  cat <<'END'
usage: CONT=image [NAME=value ...] ./run_with_docker.sh [flags of run_and_time.sh]

Files that the flags name (--weights, --train-images and the like) are mounted, read-only but for --summary-json.

environment:
  CONT            image, made by: docker build -t detection .
  DGXSYSTEM       system, config_${DGXSYSTEM}.sh is its file (toy)
  DATADIR         data set (what the config file says)
  PRETRAINED_DIR  folder of the backbone weights (data)
  LOGDIR          where logs and run folders go (results); the run folder is LOGDIR/system/benchmark/DATESTAMP
  NEXP            experiments (5); of a given seed, each takes the next
  CLEAR_CACHES    1 drops the machine's file caches before each experiment, as MLPerf asks; 0 does not (1)
  DATESTAMP       name of the run folder, and beginning of the logs' names, DATESTAMP_1.log to DATESTAMP_NEXP.log
                  (now); with that of an older call, what it left undone is done
  DOCKER          docker or podman (the first there is)

A signal lets the run save and end, and none follows. The container is removed whatever happens.

exit status: that of the first experiment that failed, 0 when all reached the target
END
}

die() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then usage && exit; fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib/resolve_config.sh
. "$here/systems.sh"
find_system "$here"
[[ -n ${CONT:-} ]] || die "CONT names no image. Make one (docker build -t detection .) and name it: CONT=detection $0"
NEXP=${NEXP:-5}
# shellcheck source=scripts/lib/experiments.sh
. "$here/series.sh"
# shellcheck source=scripts/lib/container_mounts.sh
. "$here/mounts.sh"
# shellcheck source=/dev/null
. "$here/$config"
check_series "$@"
((${DGXNNODES:-1} == 1)) || die "$config is for $DGXNNODES nodes: containers are started on one only"

docker=${DOCKER:-$(command -v docker || command -v podman || true)}
[[ -n $docker ]] || die "neither docker nor podman is on PATH. Install one, or run without: ./run_and_time.sh"
"$docker" image inspect "$CONT" >/dev/null 2>&1 ||
  die "$docker has no image $CONT, or is not running ('$docker image inspect $CONT' says which)"

# What the config file names by a relative path is beside this script.
cd "$here"
log_dir=${LOGDIR:-results}
mkdir -p "$log_dir" || die "LOGDIR=$log_dir cannot be made"
log_dir=$(folder LOGDIR "$log_dir")
options=(
  --rm --init --ipc=host --ulimit memlock=-1 --ulimit stack=67108864
  --user "$(id -u):$(id -g)"
  --env LOGDIR=/results --env BENCHMARK --env DGXSYSTEM --env DGXNGPU
)
if [[ $("$docker" --version) == podman* ]]; then options+=(--userns=keep-id); fi
dataset=${BENCHMARK^^}_DATASET
plan_mounts "$log_dir" "${!dataset:-}" "${DATADIR:-data/coco}" "$@"
options+=(--env DATADIR="$data_inside")
for ((i = 0; i < ${#mounts[@]}; i += 3)); do
  mount=type=bind,source=${mounts[i]},target=${mounts[i + 1]}
  if [[ ${mounts[i + 2]} == ro ]]; then mount+=,readonly; fi
  options+=(--mount "$mount")
  if [[ ${mounts[i + 1]} == /pretrained ]]; then options+=(--env PRETRAINED_DIR=/pretrained); fi
done
if [[ -e /dev/nvidiactl ]]; then
  if [[ ${options[*]} == *keep-id* ]]; then options+=(--device nvidia.com/gpu=all); else options+=(--gpus all); fi
elif [[ -e /dev/kfd ]]; then
  options+=(--device /dev/kfd --device /dev/dri --group-add video)
fi

# A container may not drop the machine's caches, so it is told whether they were.
# shellcheck disable=SC2329 # called by experiment
clear_caches() {
  sync
  if [[ -w /proc/sys/vm/drop_caches ]]; then
    echo 3 >/proc/sys/vm/drop_caches
  else
    sudo -n /sbin/sysctl vm.drop_caches=3 >/dev/null 2>&1
  fi
}

container=''
# shellcheck disable=SC2329 # called by the trap
remove_container() {
  if [[ -n $container ]]; then "$docker" rm --force "$container" >/dev/null 2>&1 || true; fi
}
trap remove_container EXIT

# SIGTERM, for which the run saves, and SIGKILL where it has not ended in two minutes.
# shellcheck disable=SC2329 # called by the traps
end_step() {
  until "$docker" stop -t 120 "$container" >/dev/null 2>&1; do # it may not be there yet
    kill -0 "$step" 2>/dev/null || return 0
    sleep 0.2
  done
}

# shellcheck disable=SC2329 # called by in_background
logged() {
  "$@" 2>&1 | tee --append "$log"
}

# experiment NUMBER [FLAG ...]: its status.
# shellcheck disable=SC2329 # called by run_series
experiment() {
  local number=$1 log=$log_dir/${stamp}_$(($1 + 1)).log cleared=0 result=0
  shift
  if [[ ${CLEAR_CACHES:-1} == 1 ]]; then
    if clear_caches; then
      cleared=1
    else
      echo "run_with_docker.sh: the caches could not be dropped (needs root, or sudo without a password); CLEAR_CACHES=0 ends this line"
    fi
  fi
  container=detection_${stamp//[^[:alnum:]_.-]/_}_$((number + 1))_$$
  in_background logged "$docker" run --name "$container" "${options[@]}" --env PAGE_CACHE_DROPPED="$cleared" \
    --env RUN_INDEX="$number" --env RUN_DIR="/results/$name/experiment_$number" "$CONT" ./run_and_time.sh "$@" || result=$?
  remove_container
  container=''
  return "$result"
}

stamp=${DATESTAMP:-$(date +%Y-%m-%d_%H-%M-%S)}
name=$DGXSYSTEM/$BENCHMARK/$stamp
take_signals
run_series "$log_dir/$name" experiment "${inside[@]}"
if $signalled || ((status != 0 && status != 3)); then
  printf 'To go on: DATESTAMP=%q NEXP=%s, and otherwise the same command\n' "$stamp" "$NEXP"
fi
exit "$status"
