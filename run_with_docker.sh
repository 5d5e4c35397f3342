#!/usr/bin/env bash
# Run the benchmark NEXP times, each in a new container, with one log per experiment.
set -euo pipefail

usage() {
  cat <<'END'
usage: CONT=image [NAME=value ...] ./run_with_docker.sh [flags of run_and_time.sh]

Files that the flags name (--weights, --train-images and others) are mounted read-only, except for --summary-json.

environment:
  CONT            container image, built with: docker build -t detection .
  DGXSYSTEM       system; its config file is config_${DGXSYSTEM}.sh (toy)
  DATADIR         data set (from the config file)
  PRETRAINED_DIR  folder of the backbone weights (data)
  LOGDIR          folder of logs and run folders (results); the run folder is LOGDIR/system/benchmark/DATESTAMP
  NEXP            number of experiments (5); a given seed increases by one in each
  CLEAR_CACHES    1 drops the machine's page cache before each experiment, as MLPerf requires; 0 keeps it (1)
  DATESTAMP       name of the run folder, and prefix of the log names, DATESTAMP_1.log to DATESTAMP_NEXP.log (now).
                  With the DATESTAMP of an earlier call, unfinished experiments continue
  DOCKER          docker or podman (the first one found)

On a signal the run saves a checkpoint and exits, and no other experiment starts. The container is always removed.

exit status: that of the first experiment that failed, 0 if all reached the target
END
}

die() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then usage && exit; fi

script_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=scripts/lib/resolve_config.sh
. "$script_dir/scripts/lib/resolve_config.sh"
resolve_config "$script_dir"
[[ -n ${CONT:-} ]] || die "CONT is not set. Build an image (docker build -t detection .) and name it: CONT=detection $0"
NEXP=${NEXP:-5}
# shellcheck source=scripts/lib/experiments.sh
. "$script_dir/scripts/lib/experiments.sh"
# shellcheck source=scripts/lib/container_mounts.sh
. "$script_dir/scripts/lib/container_mounts.sh"
# shellcheck source=/dev/null
. "$script_dir/$config"
check_experiments "$@"
((${DGXNNODES:-1} == 1)) || die "$config is for $DGXNNODES nodes, but this script starts containers on one. Use run.sub"

docker=${DOCKER:-$(command -v docker || command -v podman || true)}
[[ -n $docker ]] || die "neither docker nor podman is on PATH. Install one, or run without a container: ./run_and_time.sh"
"$docker" image inspect "$CONT" >/dev/null 2>&1 ||
  die "$docker has no image $CONT, or is not running. '$docker image inspect $CONT' shows which"

# Relative paths in the config file start from the folder of this script.
cd "$script_dir"
log_dir=${LOGDIR:-results}
mkdir -p "$log_dir" || die "cannot create LOGDIR=$log_dir"
log_dir=$(require_dir LOGDIR "$log_dir")
options=(
  --rm --init --ipc=host --ulimit memlock=-1 --ulimit stack=67108864
  --user "$(id -u):$(id -g)"
  --env LOGDIR=/results --env BENCHMARK --env DGXSYSTEM --env DGXNGPU
)
if [[ $("$docker" --version) == podman* ]]; then options+=(--userns=keep-id); fi
dataset=${BENCHMARK^^}_DATASET
plan_mounts "$log_dir" "${!dataset:-}" "${DATADIR:-data/coco}" "$@"
options+=(--env DATADIR="$container_data_dir")
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

# A container may not drop the page cache, so drop it here and pass on the result.
# shellcheck disable=SC2329 # called by run_experiment
drop_page_cache() {
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

# Send SIGTERM, on which the run saves a checkpoint. Send SIGKILL after two minutes.
# shellcheck disable=SC2329 # called by the traps
stop_job() {
  until "$docker" stop -t 120 "$container" >/dev/null 2>&1; do # the container may not exist yet
    kill -0 "$job_pid" 2>/dev/null || return 0
    sleep 0.2
  done
}

# shellcheck disable=SC2329 # called by run_job
run_logged() {
  "$@" 2>&1 | tee --append "$log"
}

# run_experiment NUMBER [FLAG ...]: returns its status.
# shellcheck disable=SC2329 # called by run_experiments
run_experiment() {
  local number=$1 log=$log_dir/${stamp}_$(($1 + 1)).log dropped=0 result=0
  shift
  if [[ ${CLEAR_CACHES:-1} == 1 ]]; then
    if drop_page_cache; then
      dropped=1
    else
      echo "run_with_docker.sh: could not drop the page cache: this needs root, or sudo without a password. CLEAR_CACHES=0 skips it"
    fi
  fi
  container=detection_${stamp//[^[:alnum:]_.-]/_}_$((number + 1))_$$
  run_job run_logged "$docker" run --name "$container" "${options[@]}" --env PAGE_CACHE_DROPPED="$dropped" \
    --env RUN_INDEX="$number" --env RUN_DIR="/results/$name/experiment_$number" "$CONT" ./run_and_time.sh "$@" || result=$?
  remove_container
  container=''
  return "$result"
}

stamp=${DATESTAMP:-$(date +%Y-%m-%d_%H-%M-%S)}
name=$DGXSYSTEM/$BENCHMARK/$stamp
install_signal_traps
run_experiments "$log_dir/$name" run_experiment "${container_flags[@]}"
if $signaled || ((status != 0 && status != 3)); then
  printf 'To continue: DATESTAMP=%q NEXP=%s and the same command\n' "$stamp" "$NEXP"
fi
exit "$status"
