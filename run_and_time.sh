#!/usr/bin/env bash
# Train a benchmark on a system and time the run. Installs what is missing first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<'END'
usage: [NAME=value ...] ./run_and_time.sh [--help] [--dry-run | --model-summary | --preflight | --autotune [SECONDS]] [--name value ...]

  --dry-run        show the command, the settings and what the MLPerf rules say about them; run nothing
  --model-summary  list the layers of the network: shapes, parameters, trained or frozen
  --help TOPIC     explain the settings of one topic: run, data, machine, log, training or evaluation
  --all            with --dry-run: also show the settings that have their default
  --preflight      check the machine, or every node: data, disk, memory, driver, collectives, clocks
  --decode-all     with --preflight: decode all images instead of a sample, and list the broken ones
  --autotune       search for the fastest settings of this machine, for 300 s or the given seconds. Writes
                   config_NAME.sh with --name NAME, else named after the hardware; --force overwrites an existing file

environment (paths are relative to the folder of this script):
  DGXSYSTEM       system; its config file is config_${DGXSYSTEM}.sh (toy)
  DATADIR         data set (from the config file)
  LOGDIR          parent of the run folders, LOGDIR/system/benchmark/start time (results)
  RUN_DIR         run folder, instead of one under LOGDIR
  NEXP            number of experiments, run one after the other; a given seed increases by one in each (1)
  PRETRAINED_DIR  folder of the backbone weights (data)
  DGXNGPU         ranks per node (from the config file)
  MAX_RESTARTS    restarts of the ranks after one dies; they resume with --resume auto (0)
  CLEAR_CACHES    1 drops the machine's page cache before the run, as MLPerf requires; 0 keeps it (1)
  RESET_COMMAND   shell command that resets the accelerators before the run (from the config file; empty: none)
  BENCHMARK       ssd, maskrcnn or retinanet; config files of the others: config_${DGXSYSTEM}_$BENCHMARK.sh (ssd)
  VENV            folder of the Python environment (.venv)
  MASTER_ADDR, MASTER_PORT, NODE_RANK  if DGXNNODES > 1: address of node 0, a free port on it (and the next ones, one
                  per experiment), and the number of this node, from 0. Start this script once per node. Slurm provides
                  all three (port: 29500)

To change a setting that the config file sets, pass a flag, not a variable.

NEXP=5 writes RUN_DIR/experiment_0/ to experiment_4/ and links their logs, result_0.txt to result_4.txt. To continue,
repeat the command with RUN_DIR or --resume auto: finished experiments are skipped. A signal stops all of them.

On Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 the run saves a checkpoint and exits. The same signal again ends it at once.

Other modes: --mode evaluate --weights FILE prints the twelve COCO metrics. --mode bench-train and bench-infer measure
throughput. They exit with 0 and print no RESULT line.

exit status: 0 target reached or --max-steps completed, 1 crash, 2 bad configuration or input, 3 target not reached;
with several experiments, that of the first one that failed
END
}

die() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# say TEXT: prints a line. A reader that is gone or does not read may not end or block the run.
say() {
  timeout 2 printf '%s\n' "$1" 2>/dev/null || true
}

dry_run=false model_summary=false help=false command=train flags=()
for argument in "$@"; do
  case $argument in
    -h | --help) help=true ;;
    --dry-run) dry_run=true ;;
    --model-summary) model_summary=true ;;
    --preflight) command=inspect ;;
    --autotune) command=tune flags+=("$argument") ;;
    *) flags+=("$argument") ;;
  esac
done
if $help && ((${#flags[@]} == 0)); then usage && echo; fi
{ : >&1; } 2>/dev/null || exec >/dev/null
{ : >&2; } 2>/dev/null || exec 2>/dev/null
if ! $help && ! $dry_run && ! $model_summary; then trap '' PIPE; fi

# shellcheck source=scripts/lib/resolve_config.sh
source ./scripts/lib/resolve_config.sh
resolve_config .

export NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
require_integer NODE_RANK 0 65535
require_integer RUN_INDEX 0 9999
require_integer MAX_RESTARTS 0 1000000
require_integer MASTER_PORT 1 65535
require_integer SLURM_JOB_ID 1 4294967295
require_integer SLURM_STEP_NUM_NODES 1 65535
require_integer SLURM_STEP_NUM_TASKS 1 4294967295
[[ -z ${SLURM_STEP_NUM_TASKS:-} || -z ${SLURM_STEP_NUM_NODES:-} || $SLURM_STEP_NUM_TASKS == "$SLURM_STEP_NUM_NODES" ]] ||
  die "Slurm started this SLURM_STEP_NUM_TASKS=$SLURM_STEP_NUM_TASKS times on SLURM_STEP_NUM_NODES=$SLURM_STEP_NUM_NODES nodes. Start it once per node, with srun --ntasks-per-node=1: it starts the ranks itself"

# Run this script NEXP times, one after the other.
if [[ ${NEXP:-1} != 1 ]] && ! $help && ! $model_summary && [[ $command == train ]]; then
  [[ -z ${RUN_INDEX:-} ]] || die "RUN_INDEX=$RUN_INDEX names one run, but NEXP=$NEXP. Unset one of them"
  recipe=$(
    # shellcheck source=/dev/null
    source "./$config" && require_integer DGXNNODES 1 65535
    seed=${BENCHMARK^^}_SEED && printf '%s\n' "${DGXNNODES:-1}" "${!seed:-}"
  )
  { read -r nodes && read -r seed; } <<<"$recipe" || true
  options=(--nexp "$NEXP" --nodes "$nodes" --node-rank "$NODE_RANK" "--seed=$seed" --hint RUN_DIR --parent "${LOGDIR:-results}/$DGXSYSTEM/$BENCHMARK")
  if [[ -n ${RUN_DIR:-} ]]; then options+=(--folder "$RUN_DIR"); fi
  if $dry_run; then options+=(--dry-run); fi
  run_experiments "${options[@]}" -- ./run_and_time.sh "${flags[@]}"
fi

# A variable that contradicts the config file may be left over from another system.
declare -A preset_vars=()
for name in $(compgen -e "${BENCHMARK^^}_" || true); do preset_vars[$name]=${!name}; done
# shellcheck source=/dev/null
source "./$config"
for name in "${!preset_vars[@]}"; do
  flag=${name#*_}
  [[ -z ${preset_vars[$name]} || ${!name} == "${preset_vars[$name]}" ]] ||
    die "$name=${preset_vars[$name]}: $config sets ${!name}. Unset it, or pass --$(tr '_[:upper:]' '-[:lower:]' <<<"$flag") ${preset_vars[$name]}"
done
: "${DGXNNODES:=1}" "${DGXNGPU:=1}"
require_integer DGXNNODES 1 65535
require_integer DGXNGPU 1 4096
((${SLURM_STEP_NUM_NODES:-$DGXNNODES} == DGXNNODES)) ||
  die "$config sets DGXNNODES=$DGXNNODES, but Slurm started this on SLURM_STEP_NUM_NODES=$SLURM_STEP_NUM_NODES"
((NODE_RANK < DGXNNODES)) || die "$config sets DGXNNODES=$DGXNNODES, but NODE_RANK=$NODE_RANK. It counts from 0"

python=${VENV:-.venv}/bin/python
if $help && ! "$python" -c 'import pydantic' 2>/dev/null; then echo "./setup.sh installs what --help needs to list the settings" && exit; fi
$help || ./setup.sh --quiet
if $help; then "$python" -m "$BENCHMARK" train --help "${flags[@]}" | sed 1,2d && exit; fi
if $model_summary; then exec "$python" -m "$BENCHMARK" summary "${flags[@]}"; fi

if [[ $command == tune ]]; then exec "$python" -m "$BENCHMARK" tune "${flags[@]}"; fi

# Check settings and data in a separate process before the timer starts. Mistakes end the script with 2.
if [[ $command == inspect ]]; then
  : # it reports mistakes in its table
elif $dry_run; then
  "$python" -m "$BENCHMARK" preflight --dry-run "${flags[@]}"
else
  checked=$("$python" -m "$BENCHMARK" preflight "${flags[@]}")
  { read -r org && read -r RUN_DIR && read -r mode && read -r num_classes; } <<<"$checked"
  export RUN_DIR "${BENCHMARK^^}_NUM_CLASSES=$num_classes" # the run may not read the data before its timer starts
fi

launch=("$python" -m detection.runtime.launch --nnodes "$DGXNNODES" --nproc-per-node "$DGXNGPU")
if ((DGXNNODES > 1)); then
  if [[ -z ${MASTER_ADDR:-} && -n ${SLURM_JOB_NODELIST:-} ]] && command -v scontrol >/dev/null; then
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) || true
    # Only Slurm may know the name of a node. Its address is the one that Slurm itself uses.
    MASTER_ADDR=$(scontrol show node "$first" | grep -oP '\bNodeAddr=\K\S+' || echo "$first")
  fi
  : "${MASTER_ADDR:=${SLURM_LAUNCH_NODE_IPADDR:-}}"     # in a container without scontrol: run.sub is on node 0
  if $dry_run; then : "${MASTER_ADDR:=MASTER_ADDR}"; fi # a placeholder
  [[ -n $MASTER_ADDR ]] || die "DGXNNODES=$DGXNNODES: MASTER_ADDR is not set. Set it to the address of node 0"
  # Two Slurm jobs on one node need different ports.
  : "${MASTER_PORT:=$((${SLURM_JOB_ID:-0} ? 20000 + SLURM_JOB_ID % 10000 : 29500))}"
  # One port per experiment: a node that is ahead must not connect to ranks of the previous experiment.
  port=$((MASTER_PORT + ${RUN_INDEX:-0}))
  ((port <= 65535)) || die "MASTER_PORT=$MASTER_PORT: experiment ${RUN_INDEX:-0} would use port $port. Set a lower one"
  launch+=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$port")
fi
if ((${MAX_RESTARTS:-0} > 0)); then
  [[ ${flags[*]} == *"--resume"* ]] || die "MAX_RESTARTS=$MAX_RESTARTS: pass --resume auto, or a restart would train from scratch"
  launch+=(--max-restarts "$MAX_RESTARTS")
fi
launch+=(-m "$BENCHMARK" "$command" "${flags[@]}")
if ((DGXNGPU > 1)) && [[ -z ${OMP_NUM_THREADS:-} ]]; then
  cores=$(nproc)
  export OMP_NUM_THREADS=$((cores > DGXNGPU ? cores / DGXNGPU : 1))
fi

if $dry_run; then
  printf 'launch:' && printf ' %q' "${launch[@]}" && printf '\n'
  exit
fi

if [[ $command == inspect ]]; then exec "${launch[@]}"; fi

if [[ -n ${RESET_COMMAND:-} ]]; then
  say "Resetting the accelerators: $RESET_COMMAND"
  reset_output=$(bash -c "$RESET_COMMAND" 2>&1) && reset_status=0 || reset_status=$?
  say "$reset_output"
  ((reset_status == 0)) || die "RESET_COMMAND=$RESET_COMMAND: failed with status $reset_status"
fi

drop_page_cache() {
  if [[ ${CLEAR_CACHES:-1} != 1 ]]; then
    say "Page cache kept: CLEAR_CACHES=$CLEAR_CACHES"
  elif sync && { echo 3 >/proc/sys/vm/drop_caches || sudo -n /sbin/sysctl -q vm.drop_caches=3; } 2>/dev/null; then
    PAGE_CACHE_DROPPED=1
  else
    say "Page cache kept: dropping it needs root, or sudo without a password"
  fi
}
# A container may not drop the page cache. run_with_docker.sh drops it outside and sets the variable.
if [[ -z ${PAGE_CACHE_DROPPED:-} && $mode == train ]]; then
  PAGE_CACHE_DROPPED=0
  drop_page_cache
fi
export PAGE_CACHE_DROPPED

timestamp() {
  LC_ALL=C date "+%Y-%m-%d %I:%M:%S %p"
}

# Forward the first signal. A second one would interrupt the launcher's shutdown of its ranks. The same signal again,
# unless at once, ends the run: timeout and Slurm send some signals twice.
signaled=''
# shellcheck disable=SC2329 # called by the traps
forward_signal() {
  if [[ -z $signaled ]]; then
    signaled=$1 signaled_us=${EPOCHREALTIME/[.,]/}
    kill -s "$2" "$!" || true
    say "SIG$1: stopping the run. Repeat the signal to end it at once" >&2
  elif [[ $1 == "$signaled" ]] && ((${EPOCHREALTIME/[.,]/} - signaled_us > 500000)); then
    ranks=()
    { read -r -a ranks <"/proc/$!/task/$!/children" || true; } 2>/dev/null # the file has no end of line
    kill -s KILL "${ranks[@]}" "$!" 2>/dev/null || true
    say "SIG$1: ended the run" >&2
    exit $((128 + $(kill -l "$1")))
  fi
}

start=$(timestamp)
SECONDS=0
say "STARTING TIMING RUN AT $start"
set -m # a separate process group: only this script receives Ctrl-C
LAUNCHER_PID=$$ "${launch[@]}" &
trap 'forward_signal INT INT' INT
trap 'forward_signal TERM TERM' TERM
trap 'forward_signal HUP TERM' HUP
trap 'forward_signal USR1 TERM' USR1 # `sbatch --signal` can send it before the time limit
wait "$!" && status=0 || status=$?
# An interrupted wait returns the signal's status, not the run's.
while [[ -n $signaled ]]; do
  wait "$!" && status=0 || status=$?
  kill -s 0 "$!" 2>/dev/null || break
done
seconds=$SECONDS
say "ENDING TIMING RUN AT $(timestamp)"

# Outside the timed part, and after an interrupted run, too. A failure here does not change the exit status.
# With status 2, the run folder may belong to another run.
if ((NODE_RANK == 0 && status != 2)) && [[ -s $RUN_DIR/metrics.jsonl ]]; then
  if [[ -s $RUN_DIR/detections.json || -s $RUN_DIR/segm.json ]]; then
    "$python" -m detection.evaluation.sample_predictions "$RUN_DIR" || say "warning: could not draw the sample predictions" >&2
  fi
  "$python" -m detection.report "$RUN_DIR" || say "warning: could not write the report" >&2
fi

if ((status == 0 && NODE_RANK == 0)); then
  if [[ $mode != train ]]; then
    say "No RESULT line: --mode $mode does not train to a target. Its results are above, and in $RUN_DIR"
    exit
  fi
  if "$python" -m detection.engine.experiments --is-resumed "$RUN_DIR/result_${RUN_INDEX:-0}.txt"; then
    say "No RESULT line: the run was resumed, so this time covers only its last part"
    exit
  fi
  if grep -qs '"key": "run_stop".*"status": "aborted"' "$RUN_DIR/result_${RUN_INDEX:-0}.txt"; then
    say "No RESULT line: the run stopped at --max-steps, before its target"
    exit
  fi
  say "RESULT,$mlperf_name,,$seconds,$org,$start"
fi
exit "$status"
