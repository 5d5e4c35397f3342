# shellcheck shell=bash
# NEXP experiments in one run folder: sourced by run_and_time.sh, run.sub and run_with_docker.sh, which say how one is
# started. All three leave, for the experiments from 0 on,
#   RUN/experiment_0/  what it leaves: its log, config.json, metrics.jsonl, checkpoints/, detections.json
#   RUN/result_0.txt   a link to its log, beside those of the others
# The caller has `die`, NEXP, BENCHMARK, and end_step SIGNAL, which ends what runs in the background.

signalled=false step='' seed=''

# value_of FLAG [WORD ...]: prints the value that the words give a flag, the last one; fails where they give none.
value_of() {
  local flag=$1 value found=1
  shift
  while (($#)); do
    if [[ $1 == "$flag="* ]]; then
      value=${1#*=} found=0
    elif [[ $1 == "$flag" ]] && (($# > 1)); then
      value=$2 found=0
      shift
    fi
    shift
  done
  if ((found == 0)); then printf '%s\n' "$value"; fi
  return "$found"
}

# check_series [FLAG ...]: refuses what one experiment would take from another, and sets `seed`, that of the first,
# where the flags or the variable of the recipe give one; the caller may have set it, from a config file.
check_series() {
  local flag value variable=${BENCHMARK^^}_SEED
  [[ $NEXP =~ ^[1-9][0-9]{0,3}$ ]] || die "NEXP=$NEXP is no number of experiments"
  for flag in --run-dir --log-dir --run-index; do
    if value=$(value_of "$flag" "$@"); then
      die "$flag $value: each experiment has a folder and a number of its own. Name the folder of all by RUN_DIR or LOGDIR"
    fi
  done
  if value=$(value_of --resume "$@") && [[ $value != auto && $value != none ]] && ((NEXP > 1)); then
    die "--resume $value: is of one experiment, and there are NEXP=$NEXP. Pass --resume auto, or NEXP=1"
  fi
  if [[ -z $seed ]]; then seed=${!variable:-}; fi
  if value=$(value_of --seed "$@"); then seed=$value; fi
  if [[ $seed =~ ^[0-9]{1,10}$ ]] && ((NEXP > 1)); then
    ((10#$seed + NEXP <= 2 ** 32)) || die "seed $seed: NEXP=$NEXP experiments take it and those that follow, up to 4294967295"
    echo "The seeds are $seed to $((10#$seed + NEXP - 1)): one for each experiment"
  fi
}

# flags_of RUN NUMBER [FLAG ...]: sets `own`, the flags that are this experiment's alone, which follow the others.
flags_of() {
  local folder=$1/experiment_$2 number=$2 summary
  shift 2
  own=()
  if [[ $seed =~ ^[0-9]{1,10}$ ]]; then own+=(--seed $((10#$seed + number))); fi
  if summary=$(value_of --summary-json "$@") && [[ -n $summary ]] && ((NEXP > 1)); then
    own+=(--summary-json "${summary%.json}_$number.json")
  fi
  if [[ -d $folder ]]; then own+=(--resume auto); fi
}

# status_of LOG: prints the status of a run that has come to its end, as the end of its last epoch tells.
status_of() {
  local stop
  stop=$(grep -hs '"key": "run_stop".*"epoch_num"' "$1") || return
  if [[ $stop == *'"status": "success"'* ]]; then echo 0; else echo 3; fi
}

# Passed on once: a second signal would break into the ending of the first.
# shellcheck disable=SC2329 # called by the traps
pass_on() {
  trap '' INT TERM HUP USR1
  signalled=true
  echo "SIG$1: ending the run, and no other begins" >&"$said"
  if [[ -n $step ]]; then end_step "$1" || true; fi
}

take_signals() {
  local signal
  exec {said}>&1 # where a signal comes in the midst of what has its output elsewhere
  for signal in INT TERM HUP USR1; do
    # shellcheck disable=SC2064 # the name of now
    trap "pass_on $signal" "$signal"
  done
}

# in_background COMMAND ...: its status. It is in a process group of its own, so that only end_step ends it.
in_background() {
  local result=143
  if $signalled; then return "$result"; fi
  set -m
  "$@" </dev/null &
  step=$!
  set +m
  if $signalled; then end_step TERM || true; fi # it came between those lines
  wait "$step" && result=0 || result=$?
  # A wait that a signal broke off has the signal's status, not the run's.
  if $signalled; then wait "$step" && result=0 || result=$?; fi
  step=''
  return "$result"
}

# run_series RUN START [FLAG ...]: START NUMBER [FLAG ...] for each experiment that has not come to its end, then a
# line about each. Sets `status` to that of the first that failed.
run_series() {
  local run=$1 start=$2 number result ended=() outcomes=()
  shift 2
  # All of them now: nodes that begin together see the same, and an experiment begins when all have.
  for ((number = 0; number < NEXP; number++)); do
    [[ ! -e $run/result_$number.txt || -L $run/result_$number.txt ]] ||
      die "$run holds the log of a run alone, result_$number.txt: name another folder for NEXP=$NEXP experiments"
    ended[number]=$(status_of "$run/experiment_$number/result_$number.txt") || ended[number]=''
  done
  status=0
  for ((number = 0; number < NEXP; number++)); do
    result=${ended[number]}
    if [[ -n $result ]]; then
      echo "experiment $((number + 1)) of $NEXP had come to its end, with status $result"
    else
      flags_of "$run" "$number" "$@"
      echo "experiment $((number + 1)) of $NEXP, in $run/experiment_$number"
      result=0
      "$start" "$number" "$@" "${own[@]}" || result=$?
      echo "experiment $((number + 1)) of $NEXP ended with status $result"
    fi
    outcomes[number]=$result
    if [[ -e $run/experiment_$number/result_$number.txt ]]; then
      ln -sfn "experiment_$number/result_$number.txt" "$run/result_$number.txt"
    fi
    if ((status == 0)); then status=$result; fi
    if $signalled; then break; fi
    # Bad configuration, and what cannot be started, would be so every time; or a signal has come to the run alone.
    case $result in 2 | 125 | 126 | 127 | 129 | 130 | 138 | 143) break ;; esac
  done
  trap '' INT TERM HUP USR1 # nothing is left to be ended
  summarise "$run" "${outcomes[@]}"
}

# summarise RUN STATUS ...: a line about each experiment; those that were not begun have no status.
summarise() {
  local run=$1 number log
  shift
  printf '%-12s %6s %8s %6s  %s\n' experiment status seconds epochs log
  for ((number = 0; number < NEXP; number++)); do
    log=$run/experiment_$number/result_$number.txt
    printf '%-12s %6s %8s %6s  %s\n' "$((number + 1)) of $NEXP" "${1:--}" "$(seconds "$log")" "$(epochs "$log")" \
      "$([[ -e $log ]] && echo "$run/result_$number.txt" || echo -)"
    if (($#)); then shift; fi
  done
}

# moment KEY LOG: the time of the last such event, in ms.
moment() {
  sed -n "s/.*\"time_ms\": \([0-9]*\),.*\"key\": \"$1\".*/\1/p" "$2" 2>/dev/null | tail -n 1
}

# seconds LOG: on the clock of the MLPerf log; one that was resumed has its breaks in it.
seconds() {
  local start stop
  start=$(moment run_start "$1") stop=$(moment run_stop "$1")
  if [[ -n $start && -n $stop ]]; then echo $(((stop - start + 500) / 1000)); else echo -; fi
}

# epochs LOG: those that came to their end.
epochs() {
  if [[ -e $1 ]]; then grep --count '"key": "epoch_stop"' "$1" || true; else echo -; fi
}
