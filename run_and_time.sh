#!/usr/bin/env bash
# Trains one benchmark on one system, from a bare machine on, and times it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<'END'
usage: [NAME=value ...] ./run_and_time.sh [--help] [--dry-run | --model-summary | --preflight | --autotune [SECONDS]] [--name value ...]

  --dry-run    only say what would be run, with which settings, and what the rules say of it
  --model-summary   only list the layers of the network: shapes, parameters, trained or frozen
  --preflight  only check the machine, or on each node all machines: data, disk, memory, driver, collectives, clocks
  --autotune       only measure what is fastest here, for 300 s or as many as are given, and write a config file of it:
               config_NAME.sh with --name NAME, else named after the hardware; --force writes over one that is there

environment (paths are relative to the folder of this script):
  DGXSYSTEM       system, config_${DGXSYSTEM}.sh is its file (toy)
  DATADIR         data set (what the config file says)
  LOGDIR          run folders go to LOGDIR/system/benchmark/start (results)
  RUN_DIR         this run's folder instead
  NEXP            experiments, one after the other; of a given seed, each takes the next (1)
  PRETRAINED_DIR  folder of the backbone weights (data)
  DGXNGPU         ranks on each node (what the config file says)
  MAX_RESTARTS    times that the ranks are started again after one died; with --resume auto they go on (0)
  CLEAR_CACHES    1 drops the machine's file caches before the run, as MLPerf asks; 0 does not (1)
  RESET_COMMAND   shell command before the run, to reset the accelerators (what the config file says; empty: none)
  BENCHMARK       what is trained: ssd, or maskrcnn, whose system files are config_${DGXSYSTEM}_maskrcnn.sh (ssd)
  VENV            folder of the Python environment (.venv)
  MASTER_ADDR, MASTER_PORT, NODE_RANK  where DGXNNODES > 1: address of node 0, a free port there (and those that follow,
                  one an experiment), and which node this is, from 0; started once on every node (Slurm says all
                  three; 29500)

A setting of the recipe that the config file names is changed by a flag, not by a variable.

NEXP=5 leaves RUN_DIR/experiment_0/ to experiment_4/ and, beside them, their logs result_0.txt to result_4.txt. The same
command with RUN_DIR, or with --resume auto, goes on: what has come to its end is not repeated. A signal ends all.

Other modes: --mode evaluate --weights FILE prints the twelve figures; --mode bench-train and
bench-infer say how fast this machine is. They exit with 0 when they are done, and print no RESULT.

exit status: 0 target reached, 1 crash, 2 bad configuration or input, 3 epochs used up below the target; of several
experiments that of the first that failed
END
}

die() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

dry_run=false describe=false help=false module=train flags=()
for argument in "$@"; do
  case $argument in
    -h | --help) help=true ;;
    --dry-run) dry_run=true ;;
    --model-summary) describe=true ;;
    --preflight) module=inspection ;;
    --autotune) module=tune flags+=("$argument") ;;
    *) flags+=("$argument") ;;
  esac
done
if $help; then usage; fi

export NEXP=${NEXP:-1}
[[ $NEXP =~ ^[1-9][0-9]{0,3}$ ]] || die "NEXP=$NEXP is no number of experiments"
# shellcheck source=scripts/lib/resolve_config.sh
source ./scripts/lib/resolve_config.sh
find_system .

# NEXP runs of this script, one after the other.
if ((NEXP > 1)) && ! $help && ! $describe && [[ $module == train ]]; then
  # shellcheck source=scripts/lib/experiments.sh
  source ./scripts/lib/experiments.sh
  recipe=$(
    # shellcheck source=/dev/null
    source "./$config" && seed=${BENCHMARK^^}_SEED && printf '%s\n' "${DGXNNODES:-1}" "${!seed:-}"
  )
  { read -r nodes && read -r seed; } <<<"$recipe" || true
  check_series "${flags[@]}"
  [[ -z ${RUN_INDEX:-} ]] || die "RUN_INDEX=$RUN_INDEX is of one run, and there are NEXP=$NEXP: unset one of them"
  [[ -n ${RUN_DIR:-} ]] || ((nodes == 1)) ||
    die "NEXP=$NEXP on DGXNNODES=$nodes nodes: name one RUN_DIR on all of them, on a disk that all see"

  parent=${LOGDIR:-results}/$DGXSYSTEM/$BENCHMARK
  if [[ -z ${RUN_DIR:-} && $(value_of --resume "${flags[@]}") == auto ]]; then
    for folder in "$parent"/*/experiment_0; do # the last remains
      folder=${folder%/*}
      for ((number = 0; number < NEXP; number++)); do
        status_of "$folder/experiment_$number/result_$number.txt" >/dev/null || RUN_DIR=$folder
      done
    done
    if [[ ! -d ${RUN_DIR:-} ]]; then RUN_DIR=''; fi
  fi
  run=${RUN_DIR:-}
  while [[ -z $run ]]; do
    run=$parent/$(date +%Y-%m-%d_%H-%M-%S)
    if [[ -e $run ]]; then run='' && sleep 1; fi # another series has begun in this second
  done
  # shellcheck disable=SC2329 # called by run_series
  single() {
    NEXP=1 RUN_INDEX=$1 RUN_DIR=$run/experiment_$1 in_background ./run_and_time.sh "${@:2}"
  }
  # shellcheck disable=SC2329 # called by the traps
  end_step() {
    kill -s "$1" -- "-$step"
  }
  if $dry_run; then
    echo "run folder of the NEXP=$NEXP experiments: $run"
    flags_of "$run" 0 "${flags[@]}"
    NEXP=1 RUN_INDEX=0 RUN_DIR=$run/experiment_0 exec ./run_and_time.sh --dry-run "${flags[@]}" "${own[@]}"
  fi
  take_signals
  run_series "$run" single "${flags[@]}"
  if $signalled || ((status != 0 && status != 3)); then
    printf 'To go on: RUN_DIR=%q NEXP=%s, and otherwise the same command\n' "$run" "$NEXP"
  fi
  exit "$status"
fi

# The config file is the system's recipe: a variable that contradicts it may be a leftover of another system's.
declare -A given=()
for name in $(compgen -e "${BENCHMARK^^}_" || true); do given[$name]=${!name}; done
# shellcheck source=/dev/null
source "./$config"
for name in "${!given[@]}"; do
  flag=${name#*_}
  [[ -z ${given[$name]} || ${!name} == "${given[$name]}" ]] ||
    die "$name=${given[$name]}: $config says ${!name}. Unset it, or pass --$(tr '_[:upper:]' '-[:lower:]' <<<"$flag") ${given[$name]}"
done
: "${DGXNNODES:=1}" "${DGXNGPU:=1}"
export NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
((${SLURM_STEP_NUM_NODES:-$DGXNNODES} == DGXNNODES)) ||
  die "$config says DGXNNODES=$DGXNNODES, and Slurm started this on SLURM_STEP_NUM_NODES=$SLURM_STEP_NUM_NODES"
((NODE_RANK < DGXNNODES)) || die "$config says DGXNNODES=$DGXNNODES, and this is NODE_RANK=$NODE_RANK, from 0"

./setup.sh --quiet
python=${VENV:-.venv}/bin/python
if $help; then exec "$python" -m "$BENCHMARK.preflight" --help; fi
if $describe; then exec "$python" -m "$BENCHMARK.preflight" --model-summary "${flags[@]}"; fi

if [[ $module == tune ]]; then exec "$python" -m "$BENCHMARK.tune" "${flags[@]}"; fi

# Before the clock, in a process of its own: the mistakes of user and data end here, with 2.
if [[ $module == inspection ]]; then
  : # which tells them in its table
elif $dry_run; then
  "$python" -m "$BENCHMARK.preflight" --dry-run "${flags[@]}"
else
  checked=$("$python" -m "$BENCHMARK.preflight" "${flags[@]}")
  { read -r org && read -r RUN_DIR && read -r mode && read -r num_classes; } <<<"$checked"
  export RUN_DIR "${BENCHMARK^^}_NUM_CLASSES=$num_classes" # counted here: the run may not look before its clock
fi

launch=("$python" -m detection.runtime.launch --nnodes "$DGXNNODES" --nproc-per-node "$DGXNGPU")
if ((DGXNNODES > 1)); then
  if [[ -z ${MASTER_ADDR:-} && -n ${SLURM_JOB_NODELIST:-} ]] && command -v scontrol >/dev/null; then
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) || true
    # A node's name may be known to Slurm alone; its address is what Slurm itself calls.
    MASTER_ADDR=$(scontrol show node "$first" | grep -oP '\bNodeAddr=\K\S+' || echo "$first")
  fi
  : "${MASTER_ADDR:=${SLURM_LAUNCH_NODE_IPADDR:-}}" # in a container, which lacks scontrol: run.sub is on node 0
  [[ -n $MASTER_ADDR ]] || die "DGXNNODES=$DGXNNODES: MASTER_ADDR names no node. Set it to the address of node 0"
  # Two jobs of Slurm on one node take two ports.
  : "${MASTER_PORT:=$((${SLURM_JOB_ID:-0} ? 20000 + SLURM_JOB_ID % 10000 : 29500))}"
  # A port for each experiment: a node that is ahead must not meet the ranks of the one before.
  launch+=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port $((MASTER_PORT + ${RUN_INDEX:-0})))
fi
if ((${MAX_RESTARTS:-0} > 0)); then
  [[ ${flags[*]} == *"--resume"* ]] || die "MAX_RESTARTS=$MAX_RESTARTS: pass --resume auto, or a restart would begin anew"
  launch+=(--max-restarts "$MAX_RESTARTS")
fi
launch+=(-m "$BENCHMARK.$module" "${flags[@]}")
if ((DGXNGPU > 1)) && [[ -z ${OMP_NUM_THREADS:-} ]]; then
  cores=$(nproc)
  export OMP_NUM_THREADS=$((cores > DGXNGPU ? cores / DGXNGPU : 1))
fi

if $dry_run; then
  printf 'launch:' && printf ' %q' "${launch[@]}" && printf '\n'
  exit
fi

if [[ $module == inspection ]]; then exec "${launch[@]}"; fi

if [[ -n ${RESET_COMMAND:-} ]]; then
  echo "Resetting the accelerators: $RESET_COMMAND"
  bash -c "$RESET_COMMAND" || die "RESET_COMMAND=$RESET_COMMAND: it ended with status $?"
fi

drop_caches() {
  if [[ ${CLEAR_CACHES:-1} != 1 ]]; then
    echo "The machine's file caches are kept: CLEAR_CACHES=$CLEAR_CACHES"
  elif sync && { echo 3 >/proc/sys/vm/drop_caches || sudo -n /sbin/sysctl -q vm.drop_caches=3; } 2>/dev/null; then
    PAGE_CACHE_DROPPED=1
  else
    echo "The machine's file caches are kept: dropping them needs root, or sudo without a password"
  fi
}
# run_with_docker.sh drops them outside the container, which may not, and says so.
if [[ -z ${PAGE_CACHE_DROPPED:-} && $mode == train ]]; then
  PAGE_CACHE_DROPPED=0
  drop_caches
fi
export PAGE_CACHE_DROPPED

timestamp() {
  LC_ALL=C date "+%Y-%m-%d %I:%M:%S %p"
}

# Passed on once: a second signal would break into the launcher's ending of its ranks.
signalled=false
# shellcheck disable=SC2329 # called by the traps
pass_on() {
  trap '' INT TERM HUP USR1
  signalled=true
  echo "SIG$1: ending the run" >&2
  kill -s "$2" "$!" || true
}

start=$(timestamp)
start_s=$(date +%s)
echo "STARTING TIMING RUN AT $start"
set -m # in a process group of its own, so that Ctrl-C comes here alone
"${launch[@]}" &
trap 'pass_on INT INT' INT
trap 'pass_on TERM TERM' TERM
trap 'pass_on HUP TERM' HUP
trap 'pass_on USR1 TERM' USR1 # as `sbatch --signal` can be asked to send ahead of the time limit
wait "$!" && status=0 || status=$?
# A wait that a signal broke off has the signal's status, not the run's.
if $signalled; then wait "$!" && status=0 || status=$?; fi
end_s=$(date +%s)
echo "ENDING TIMING RUN AT $(timestamp)"

# Off the clock, and of a run that was broken off, too; what cannot be drawn costs the report, not the run.
if ((NODE_RANK == 0)) && [[ -s $RUN_DIR/metrics.jsonl ]]; then
  if [[ -s $RUN_DIR/detections.json || -s $RUN_DIR/segm.json ]]; then
    "$python" -m detection.evaluation.sample_predictions "$RUN_DIR" || echo "warning: no pictures were drawn" >&2
  fi
  "$python" -m detection.report.html_report "$RUN_DIR" || echo "warning: no report was made" >&2
fi

if ((status == 0 && NODE_RANK == 0)); then
  if [[ $mode != train ]]; then
    echo "No RESULT line: --mode $mode trains nothing to a target. What it gave is above, and in $RUN_DIR"
    exit
  fi
  if grep -qs '"key": "resumed"' "$RUN_DIR/result_${RUN_INDEX:-0}.txt"; then
    echo "No RESULT line: the run was resumed, and this was the time of its last part"
    exit
  fi
  echo "RESULT,$result,,$((end_s - start_s)),$org,$start"
fi
exit "$status"
