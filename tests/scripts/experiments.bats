#!/usr/bin/env bats
# NEXP=5 ./run_and_time.sh, with a stub python whose runs write an MLPerf log.

load scripts

setup() {
  unset "${!SSD_@}" "${!DGX@}" "${!SLURM_@}" DATADIR RUN_DIR NODE_RANK MASTER_ADDR MASTER_PORT PAGE_CACHE_DROPPED \
    OMP_NUM_THREADS BENCHMARK RESET_COMMAND RUN_INDEX
  folder="$BATS_TEST_TMPDIR/a clone"
  mkdir -p "$folder/venv/bin" "$folder/scripts"
  cp -r "$repository/scripts/lib" "$folder/scripts"
  cp "$repository/run_and_time.sh" "$repository/config_toy.sh" "$folder"
  export calls=$BATS_TEST_TMPDIR/calls VENV=venv CLEAR_CACHES=0 NEXP=5 LOGDIR="$BATS_TEST_TMPDIR/the logs"
  : >"$calls"
  printf '#!/bin/sh\n' >"$folder/setup.sh"
  # STATUSES: exit status of each run. WAIT: number of the run that waits for a signal.
  cat >"$folder/venv/bin/python" <<'END_PYTHON'
#!/usr/bin/env bash
all=$*
if [[ $3 == preflight ]]; then
  if [[ $all == *--dry-run* ]]; then echo "settings of ${all#*preflight }" && exit; fi
  [[ $all != *--wrong* ]] || exit 2
  mkdir -p "$RUN_DIR"
  printf '%s\n' "Some Lab" "$RUN_DIR" train 7 && exit
fi
echo "$RUN_INDEX ${RUN_DIR##*/} [$PAGE_CACHE_DROPPED]${all##*ssd train}" >>"$calls"
[[ $all != *master-port* ]] || sed 's/.*\(--master-port [0-9]*\).*/\1/' <<<"$all" >>"$calls.ports"
log=$RUN_DIR/result_$RUN_INDEX.txt
event() { echo ":::MLLOG {\"time_ms\": $1, \"key\": \"$2\", \"metadata\": {$3}}" >>"$log"; }
statuses=(${STATUSES:-})
status=${statuses[RUN_INDEX]:-0}
event 1000 run_start
if [[ $RUN_INDEX == "${WAIT:-}" && ! -e $calls.waits ]]; then
  trap 'kill %1; event 3000 run_stop "\"status\": \"aborted\""; echo "ended by $SIGNAL"; exit "$ENDS"' "$SIGNAL"
  sleep 60 3>&- &
  touch "$calls.waits"
  wait
fi
case $status in
  0) event 2000 epoch_stop && event 94000 run_stop '"status": "success", "epoch_num": 1' ;;
  3) event 2000 epoch_stop && event 3000 epoch_stop && event 9000 run_stop '"status": "aborted", "epoch_num": 2' ;;
  *) event 2500 run_stop '"status": "aborted"' ;;
esac
exit "$status"
END_PYTHON
  chmod +x "$folder/setup.sh" "$folder/venv/bin/python"
}

run_and_time() {
  run "$folder/run_and_time.sh" "$@"
}

@test "five experiments share a run folder, each with its own folder, and their logs are linked" {
  RUN_DIR="$LOGDIR/one run" run_and_time
  [ "$status" -eq 0 ]
  [ "$(wc -l <"$calls")" -eq 5 ]
  [ "$(grep --count '^RESULT,' <<<"$output")" -eq 5 ]
  for i in 0 1 2 3 4; do
    grep --quiet --line-regexp "$i experiment_$i \[0\]" "$calls"
    [ "$(readlink "$LOGDIR/one run/result_$i.txt")" = "experiment_$i/result_$i.txt" ]
    grep --quiet run_stop "$LOGDIR/one run/result_$i.txt"
  done
}

@test "without RUN_DIR the run folder is under LOGDIR" {
  run_and_time
  [ "$(find "$LOGDIR/toy/ssd" -mindepth 1 -maxdepth 1 | wc -l)" -eq 1 ]
  [ "$(find "$LOGDIR"/toy/ssd/*/ -maxdepth 1 -name 'result_*.txt' | wc -l)" -eq 5 ]
}

@test "the page cache is dropped before each experiment, and the run records it" {
  [ -w /proc/sys/vm/drop_caches ] || skip "dropping caches needs root"
  CLEAR_CACHES=1 NEXP=2 run_and_time
  [ "$(grep --count '\[1\]' "$calls")" -eq 2 ]
}

@test "each experiment gets its own seed, and the seeds are reported" {
  for given in "--seed 7" "--seed=7"; do
    : >"$calls"
    # shellcheck disable=SC2086 # two words
    NEXP=3 run_and_time $given --log-every 1
    [[ $output == *"Seeds: 7 to 9, one per experiment"* ]]
    [ "$(grep -o -e '--seed [0-9]*$' "$calls" | xargs)" = "--seed 7 --seed 8 --seed 9" ]
  done
  : >"$calls"
  NEXP=2 SSD_SEED=11 run_and_time
  [ "$(grep -o -e '--seed [0-9]*$' "$calls" | xargs)" = "--seed 11 --seed 12" ]
  : >"$calls"
  NEXP=2 run_and_time
  [ "$(grep --count -e --seed "$calls")" -eq 0 ]
  NEXP=2 run_and_time --seed 4294967295
  [[ $status -eq 2 && $output == "error: seed 4294967295: NEXP=2 experiments use consecutive seeds"* ]]
}

@test "each experiment writes its own summary file" {
  NEXP=2 run_and_time --summary-json "my speed.json"
  [ "$(sed 's/.*--summary-json //' "$calls" | xargs)" = "my speed_0.json my speed_1.json" ]
}

@test "the other experiments run after a failed one, and the script exits with the first failure's status" {
  STATUSES="0 1 137 3 0" run_and_time
  [ "$status" -eq 1 ]
  [ "$(wc -l <"$calls")" -eq 5 ]
  [[ $output == *"experiment 3 of 5 finished with status 137"* ]]
  [ "$(grep --count '^RESULT,' <<<"$output")" -eq 2 ]
}

@test "a bad configuration stops all experiments with one message" {
  run_and_time --wrong
  [ "$status" -eq 2 ]
  [ ! -s "$calls" ]
  [[ $output != *"experiment 2 of 5,"* ]]
}

@test "the summary lists status, time and epochs of each experiment" {
  STATUSES="0 3 1" NEXP=3 RUN_DIR=$LOGDIR/run run_and_time
  summary=$(sed -n '/^experiment .*epochs/,/^3 of 3/p' <<<"$output" | tr -s ' ')
  [ "$summary" = "experiment status seconds epochs log
1 of 3 0 93 1 $LOGDIR/run/result_0.txt
2 of 3 3 8 2 $LOGDIR/run/result_1.txt
3 of 3 1 2 0 $LOGDIR/run/result_2.txt" ]
}

# interrupt SIGNAL [NAME=value ...]: sends the signal during the third experiment; sets `status`.
interrupt() {
  rm -f "$calls.waits"
  SIGNAL=$1
  if [[ $1 == HUP || $1 == USR1 ]]; then SIGNAL=TERM; fi
  ENDS=143
  if [[ $1 == INT ]]; then ENDS=130; fi
  export SIGNAL ENDS WAIT=2
  env --default-signal=INT "${@:2}" "$folder/run_and_time.sh" --seed 7 >"$BATS_TEST_TMPDIR/out" 2>&1 3>&- &
  local script=$!
  until [[ -e $calls.waits ]]; do sleep 0.05; done
  kill -s "$1" "$script"
  wait "$script" && status=0 || status=$?
}

@test "a signal stops the experiment and the following ones, and the message tells how to continue" {
  for signal in INT TERM HUP USR1; do
    : >"$calls"
    interrupt "$signal" RUN_DIR="$LOGDIR/run $signal"
    [ "$status" -eq "$([[ $signal == INT ]] && echo 130 || echo 143)" ]
    [ "$(wc -l <"$calls")" -eq 3 ]
    grep --quiet "ended by $SIGNAL" "$BATS_TEST_TMPDIR/out"
    grep --quiet --fixed-strings "To continue: RUN_DIR=$(printf %q "$LOGDIR/run $signal") NEXP=5" "$BATS_TEST_TMPDIR/out"
    [ "$(grep '^4 of 5' "$BATS_TEST_TMPDIR/out" | xargs)" = "4 of 5 - - - -" ]
  done
}

@test "after an interruption in the third of five, the same command with RUN_DIR resumes there" {
  interrupt TERM RUN_DIR="$LOGDIR/run"
  : >"$calls"
  RUN_DIR=$LOGDIR/run run_and_time --seed 7
  [ "$status" -eq 0 ]
  [ "$(<"$calls")" = "2 experiment_2 [0] --seed 7 --seed 9 --resume auto
3 experiment_3 [0] --seed 7 --seed 10
4 experiment_4 [0] --seed 7 --seed 11" ]
  [[ $output == *"experiment 2 of 5 is already finished, with status 0"* ]]
  : >"$calls"
  RUN_DIR=$LOGDIR/run run_and_time --seed 7
  [ ! -s "$calls" ]
}

@test "--resume auto continues in the last unfinished run folder" {
  mkdir -p "$LOGDIR/toy/ssd/2020-01-01_00-00-00/experiment_0" # older
  interrupt TERM
  run_folder=$(find "$LOGDIR/toy/ssd" -name '*_*' -path '*experiment_2')
  : >"$calls"
  run_and_time --seed 7 --resume auto
  [ "$status" -eq 0 ]
  [ "$(cut -d ' ' -f 1 "$calls" | xargs)" = "2 3 4" ]
  [ -e "${run_folder%/*}/result_4.txt" ]
}

@test "an experiment that ended below its target is skipped, and a crashed one is repeated" {
  STATUSES="3 1 0" NEXP=3 RUN_DIR=$LOGDIR/run run_and_time
  : >"$calls"
  NEXP=3 RUN_DIR=$LOGDIR/run run_and_time
  [ "$status" -eq 3 ]
  [ "$(cut -d ' ' -f 1 "$calls")" = 1 ]
}

@test "a single run is not overwritten, and experiments cannot share folders or numbers" {
  mkdir -p "$LOGDIR/run"
  echo precious >"$LOGDIR/run/result_3.txt"
  RUN_DIR=$LOGDIR/run run_and_time
  [[ $status -eq 2 && $output == *"$LOGDIR/run contains the log of a single run, result_3.txt"* ]]
  [ "$(<"$LOGDIR/run/result_3.txt")" = precious ]
  run_and_time --run-dir here
  [[ $status -eq 2 && $output == "error: --run-dir here: each experiment has its own folder"* ]]
  RUN_INDEX=2 run_and_time
  [[ $status -eq 2 && $output == "error: RUN_INDEX=2 names one run"* ]]
  run_and_time --resume some.pt
  [[ $status -eq 2 && $output == "error: --resume some.pt: names one experiment"* ]]
  NEXP=many run_and_time
  [[ $status -eq 2 && $output == "error: NEXP=many is not a valid number of experiments" ]]
  [ ! -s "$calls" ]
}

@test "a dry run of several experiments launches nothing and prints their folder and seeds" {
  RUN_DIR=$LOGDIR/run run_and_time --dry-run --seed 7
  [ "$status" -eq 0 ]
  [[ $output == *"Seeds: 7 to 11"*"run folder of the NEXP=5 experiments: $LOGDIR/run"*"launch: "* ]]
  [ ! -s "$calls" ]
  [ ! -e "$LOGDIR/run" ]
}

@test "one experiment is a single run in its own folder" {
  NEXP=1 RUN_DIR=$LOGDIR/run run_and_time --seed 7
  [ "$status" -eq 0 ]
  [ -f "$LOGDIR/run/result_.txt" ]
  [[ $(<"$calls") == " run [0] --seed 7" && $output != *"of 1"* ]]
}

@test "several nodes share a run folder, with one port per experiment" {
  sed -i 's/DGXNNODES=1/DGXNNODES=2/' "$folder/config_toy.sh"
  MASTER_ADDR=node0 run_and_time
  [[ $status -eq 2 && $output == "error: NEXP=5 on DGXNNODES=2 nodes: set the same RUN_DIR on all of them"* ]]
  MASTER_ADDR=node0 RUN_DIR=$LOGDIR/run NEXP=3 run_and_time
  [ "$status" -eq 0 ]
  [ "$(xargs <"$calls.ports")" = "--master-port 29500 --master-port 29501 --master-port 29502" ]
}
