# shellcheck shell=bash
# NEXP experiments in one run folder, sourced by run_and_time.sh, run.sub and run_with_docker.sh. Each of them defines
# how one experiment starts. All three leave, for the experiments from 0 on,
#   RUN/experiment_0/  its files: MLPerf log, config.json, metrics.jsonl, checkpoints/, detections.json
#   RUN/result_0.txt   a link to its MLPerf log, next to the other logs
# The caller defines `die`, NEXP, BENCHMARK, and stop_job SIGNAL, which ends the background job.

signaled=false job_pid='' seed=''

# flag_value FLAG [WORD ...]: prints the last value that the words give the flag. Fails if they give none.
flag_value() {
  local flag=$1 value status=1
  shift
  while (($#)); do
    if [[ $1 == "$flag="* ]]; then
      value=${1#*=} status=0
    elif [[ $1 == "$flag" ]] && (($# > 1)); then
      value=$2 status=0
      shift
    fi
    shift
  done
  if ((status == 0)); then printf '%s\n' "$value"; fi
  return "$status"
}

# check_experiments [FLAG ...]: rejects flags that experiments cannot share. Sets `seed`, the seed of the first one,
# from the flags or the benchmark's variable. The caller may have set it before, from a config file.
check_experiments() {
  local flag value variable=${BENCHMARK^^}_SEED
  [[ $NEXP =~ ^[1-9][0-9]{0,3}$ ]] || die "NEXP=$NEXP is not a valid number of experiments"
  for flag in --run-dir --log-dir --run-index; do
    if value=$(flag_value "$flag" "$@"); then
      die "$flag $value: each experiment has its own folder and number. Name the common folder with RUN_DIR or LOGDIR"
    fi
  done
  if value=$(flag_value --resume "$@") && [[ $value != auto && $value != none ]] && ((NEXP > 1)); then
    die "--resume $value: names one experiment, but NEXP=$NEXP. Pass --resume auto, or NEXP=1"
  fi
  if [[ -z $seed ]]; then seed=${!variable:-}; fi
  if value=$(flag_value --seed "$@"); then seed=$value; fi
  if [[ $seed =~ ^[0-9]{1,10}$ ]] && ((NEXP > 1)); then
    ((10#$seed + NEXP <= 2 ** 32)) || die "seed $seed: NEXP=$NEXP experiments use consecutive seeds, and the maximum is 4294967295"
    echo "Seeds: $seed to $((10#$seed + NEXP - 1)), one per experiment"
  fi
}

# experiment_flags RUN NUMBER [FLAG ...]: sets `extra_flags`, which only this experiment gets, after the common ones.
experiment_flags() {
  local folder=$1/experiment_$2 number=$2 summary
  shift 2
  extra_flags=()
  if [[ $seed =~ ^[0-9]{1,10}$ ]]; then extra_flags+=(--seed $((10#$seed + number))); fi
  if summary=$(flag_value --summary-json "$@") && [[ -n $summary ]] && ((NEXP > 1)); then
    extra_flags+=(--summary-json "${summary%.json}_$number.json")
  fi
  if [[ -d $folder ]]; then extra_flags+=(--resume auto); fi
}

# finished_status LOG: prints the exit status of a finished run. A finished log has run_stop with an epoch number.
finished_status() {
  local stop
  stop=$(grep -hs '"key": "run_stop".*"epoch_num"' "$1") || return
  if [[ $stop == *'"status": "success"'* ]]; then echo 0; else echo 3; fi
}

# Forward only the first signal: a second one would interrupt the shutdown.
# shellcheck disable=SC2329 # called by the traps
forward_signal() {
  trap '' INT TERM HUP USR1
  signaled=true
  echo "SIG$1: stopping the run, no other experiment starts" >&"$stdout_fd"
  if [[ -n $job_pid ]]; then stop_job "$1" || true; fi
}

install_signal_traps() {
  local signal
  exec {stdout_fd}>&1 # the trap may run while stdout is redirected
  for signal in INT TERM HUP USR1; do
    # shellcheck disable=SC2064 # expand the name now
    trap "forward_signal $signal" "$signal"
  done
}

# run_job COMMAND ...: returns its status. The job has its own process group, so that only stop_job ends it.
run_job() {
  local result=143
  if $signaled; then return "$result"; fi
  set -m
  "$@" </dev/null &
  job_pid=$!
  set +m
  if $signaled; then stop_job TERM || true; fi # the signal arrived between the lines above
  wait "$job_pid" && result=0 || result=$?
  # An interrupted wait returns the signal's status, not the run's.
  if $signaled; then wait "$job_pid" && result=0 || result=$?; fi
  job_pid=''
  return "$result"
}

# run_experiments RUN START [FLAG ...]: calls START NUMBER [FLAG ...] for each unfinished experiment, then prints the
# summary. Sets `status` to that of the first experiment that failed.
run_experiments() {
  local run=$1 start=$2 number result finished=() statuses=()
  shift 2
  # Check all of them first: nodes that start together must agree, and an experiment starts only on all nodes.
  for ((number = 0; number < NEXP; number++)); do
    [[ ! -e $run/result_$number.txt || -L $run/result_$number.txt ]] ||
      die "$run contains the log of a single run, result_$number.txt. Name another folder for NEXP=$NEXP experiments"
    finished[number]=$(finished_status "$run/experiment_$number/result_$number.txt") || finished[number]=''
  done
  status=0
  for ((number = 0; number < NEXP; number++)); do
    result=${finished[number]}
    if [[ -n $result ]]; then
      echo "experiment $((number + 1)) of $NEXP is already finished, with status $result"
    else
      experiment_flags "$run" "$number" "$@"
      echo "experiment $((number + 1)) of $NEXP, in $run/experiment_$number"
      result=0
      "$start" "$number" "$@" "${extra_flags[@]}" || result=$?
      echo "experiment $((number + 1)) of $NEXP finished with status $result"
    fi
    statuses[number]=$result
    if [[ -e $run/experiment_$number/result_$number.txt ]]; then
      ln -sfn "experiment_$number/result_$number.txt" "$run/result_$number.txt"
    fi
    if ((status == 0)); then status=$result; fi
    if $signaled; then break; fi
    # A bad configuration or a command that cannot start would fail every time. The others mean that only the run got
    # a signal.
    case $result in 2 | 125 | 126 | 127 | 129 | 130 | 138 | 143) break ;; esac
  done
  trap '' INT TERM HUP USR1 # no job is left to stop
  print_summary "$run" "${statuses[@]}"
}

# print_summary RUN STATUS ...: prints one line per experiment. Experiments that did not start have no status.
print_summary() {
  local run=$1 number log
  shift
  printf '%-12s %6s %8s %6s  %s\n' experiment status seconds epochs log
  for ((number = 0; number < NEXP; number++)); do
    log=$run/experiment_$number/result_$number.txt
    printf '%-12s %6s %8s %6s  %s\n' "$((number + 1)) of $NEXP" "${1:--}" "$(run_seconds "$log")" "$(num_epochs "$log")" \
      "$([[ -e $log ]] && echo "$run/result_$number.txt" || echo -)"
    if (($#)); then shift; fi
  done
}

# event_time_ms KEY LOG: prints the time of the last event with this key, in ms.
event_time_ms() {
  sed -n "s/.*\"time_ms\": \([0-9]*\),.*\"key\": \"$1\".*/\1/p" "$2" 2>/dev/null | tail -n 1
}

# run_seconds LOG: prints the time by the MLPerf log. A resumed run includes its interruptions.
run_seconds() {
  local start stop
  start=$(event_time_ms run_start "$1") stop=$(event_time_ms run_stop "$1")
  if [[ -n $start && -n $stop ]]; then echo $(((stop - start + 500) / 1000)); else echo -; fi
}

# num_epochs LOG: prints the number of completed epochs.
num_epochs() {
  if [[ -e $1 ]]; then grep --count '"key": "epoch_stop"' "$1" || true; else echo -; fi
}
