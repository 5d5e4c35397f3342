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
# shellcheck source=scripts/lib/container_mounts.sh
. "$script_dir/scripts/lib/container_mounts.sh"
# shellcheck source=/dev/null
. "$script_dir/$config"
[[ ${DGXNNODES:-1} == 1 ]] || die "$config is for $DGXNNODES nodes, but this script starts containers on one. Use run.sub"

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
  --env LOGDIR=/results --env BENCHMARK --env DGXSYSTEM --env DGXNGPU --env ECHO_LOG
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

stamp=${DATESTAMP:-$(date +%Y-%m-%d_%H-%M-%S)}
name=$DGXSYSTEM/$BENCHMARK/$stamp
# A container may not drop the page cache, so it is dropped here.
page_cache=keep
if [[ ${CLEAR_CACHES:-1} == 1 ]]; then page_cache=drop; fi
seed=${BENCHMARK^^}_SEED
run_experiments --nexp "${NEXP:-5}" "--seed=${!seed:-}" --folder "$log_dir/$name" --folder-in-job "/results/$name" \
  --log "$log_dir/$stamp" --tee --page-cache "$page_cache" --container "detection_$stamp" --hint "DATESTAMP=$stamp" -- \
  "$docker" run "${options[@]}" "$CONT" ./run_and_time.sh "${container_flags[@]}"
