#!/usr/bin/env bats
# run_and_time.sh in a separate folder, with stubs for setup.sh and the environment's python.

load scripts

setup() {
  unset "${!SSD_@}" "${!DGX@}" "${!SLURM_@}" DATADIR LOGDIR RUN_DIR NODE_RANK MASTER_ADDR MASTER_PORT PAGE_CACHE_DROPPED \
    OMP_NUM_THREADS BENCHMARK RESET_COMMAND NEXP RUN_INDEX
  folder="$BATS_TEST_TMPDIR/a clone"
  mkdir -p "$folder/venv/bin" "$folder/scripts"
  cp -r "$repository/scripts/lib" "$folder/scripts"
  cp "$repository/run_and_time.sh" "$repository"/config_*.sh "$folder"
  # shellcheck source=/dev/null
  batch=$(. "$repository/config_toy.sh" && echo "$SSD_BATCH_SIZE")
  export calls=$BATS_TEST_TMPDIR/calls VENV=venv CLEAR_CACHES=0
  : >"$calls"
  cat >"$folder/setup.sh" <<'END'
#!/usr/bin/env bash
echo "setup $*" >>"$calls"
END
  cat >"$folder/venv/bin/python" <<'END'
#!/usr/bin/env bash
if [[ $2 == detection.engine.experiments ]]; then exec python3 "$@"; fi
echo "python $* [$SSD_BATCH_SIZE, $RUN_DIR, $PAGE_CACHE_DROPPED, $DATADIR]" >>"$calls"
case $2/$3 in
  */preflight | */summary) [[ ${PREFLIGHT:-0} == 0 ]] && printf '%s\n' "Some Lab" "${RUN:-/runs/this one}" "${MODE:-train}" 7 || exit "$PREFLIGHT" ;;
  detection.evaluation.sample_predictions/* | detection.report/*) exit "${REPORT:-0}" ;;
  detection.runtime.launch/*)
    echo "$SSD_NUM_CLASSES" >"$calls.classes"
    if [[ -n ${WAIT:-} ]]; then
      trap '[[ -n ${STUBBORN:-} ]] || { kill %1; echo "ended by $signal"; exit 130; }' INT
      sleep 60 3>&- &
      echo "$!" >"$WAIT"
      until wait "$!"; do [[ -e /proc/$! ]] || break; done
    fi
    exit "${STATUS:-0}"
    ;;
esac
END
  chmod +x "$folder/setup.sh" "$folder/venv/bin/python"
}

run_and_time() {
  run "$folder/run_and_time.sh" "$@"
}

@test "a run that reaches its target prints one RESULT line with organization and start time" {
  run_and_time --org x
  [ "$status" -eq 0 ]
  start=$(sed -n 's/^STARTING TIMING RUN AT //p' <<<"$output")
  [[ $start =~ ^[0-9]{4}-[0-9]{2}-[0-9]{2}\ [0-9]{2}:[0-9]{2}:[0-9]{2}\ [AP]M$ ]]
  [ "$(grep --count '^ENDING TIMING RUN AT ' <<<"$output")" -eq 1 ]
  [ "$(grep --count RESULT <<<"$output")" -eq 1 ]
  [[ $(grep RESULT <<<"$output") =~ ^RESULT,SINGLE_STAGE_DETECTOR,,[0-9]+,Some\ Lab,"$start"$ ]]
}

@test "setup, preflight and launch run in this order, with the flags" {
  run_and_time --name "two words"
  [ "$(sed 's/ .*preflight.*/ preflight/; s/ -m detection.*/ launch/' "$calls")" = "$(printf 'setup --quiet\npython preflight\npython launch')" ]
  grep -qF -- "-m ssd preflight --name two words [$batch, , , data/toy]" "$calls"
  [ "$(<"$calls.classes")" -eq 7 ] # counted by preflight
  grep -qF -- "-m detection.runtime.launch --nnodes 1 --nproc-per-node 1 -m ssd train --name two words [$batch, /runs/this one, 0, data/toy]" "$calls"
}

@test "a failed run prints no RESULT, and the script exits with its status" {
  for expected in 1 2 3 137; do
    STATUS=$expected run_and_time
    [ "$status" -eq "$expected" ]
    [[ $output != *RESULT* ]]
    [[ $output == *ENDING* ]]
  done
}

@test "every started run gets a report after the timed part, and a failing report changes nothing" {
  export RUN="$BATS_TEST_TMPDIR/a run"
  mkdir "$RUN"
  echo '{"event": "run_start"}' >"$RUN/metrics.jsonl"
  for expected in 0 1 3 143; do
    for REPORT in 0 1; do
      : >"$calls"
      export REPORT
      STATUS=$expected run_and_time
      [ "$status" -eq "$expected" ]
      [ "$(grep --count RESULT <<<"$output")" -eq $((expected == 0)) ]
      [ "$(grep --count 'warning: could not write the report' <<<"$output")" -eq "$REPORT" ]
      [[ $(tail -1 "$calls") == "python -m detection.report $RUN ["* ]]
      [ "$(grep --count sample_predictions "$calls")" -eq 0 ] # the run has no detections
    done
  done
  echo '[]' >"$RUN/detections.json"
  run_and_time
  [ "$(sed -n 's/python -m \([a-z_.]*\) .*/\1/p' "$calls" | tail -3)" = "$(printf 'detection.runtime.launch\ndetection.evaluation.sample_predictions\ndetection.report')" ]
}

@test "a run that did not start or was refused, and every node but the first, write no report" {
  run_and_time
  export RUN=$BATS_TEST_TMPDIR
  : >"$RUN/metrics.jsonl"
  run_and_time
  echo '{}' >"$RUN/metrics.jsonl"
  DGXSYSTEM=DGXA100_multi_2x8x56 NODE_RANK=1 MASTER_ADDR=node0 run_and_time
  STATUS=2 run_and_time # the folder may belong to another run
  [ "$(grep --count launch "$calls")" -eq 4 ]
  [ "$(grep --count report "$calls")" -eq 0 ]
}

@test "a mistake found by preflight ends the script with 2" {
  PREFLIGHT=2 run_and_time
  [ "$status" -eq 2 ]
  [[ $output != *STARTING* ]]
  [ "$(grep --count launch "$calls")" -eq 0 ]
}

@test "an unknown system is rejected with the list of systems" {
  DGXSYSTEM=DGX9 run_and_time
  [ "$status" -eq 2 ]
  [[ $output == *DGX9*config_DGX1.sh*config_toy.sh* ]]
}

@test "an unknown benchmark is rejected" {
  BENCHMARK=bert run_and_time
  [ "$status" -eq 2 ]
  [[ $output == *"BENCHMARK=bert"* ]]
}

@test "DGXSYSTEM selects the config file, and the user's DATADIR and DGXNGPU take precedence" {
  DGXSYSTEM=DGX1 DATADIR=/my/coco DGXNGPU=4 run_and_time
  [ "$status" -eq 0 ]
  grep -q -- "--nproc-per-node 4 .* \[120, .*, /my/coco\]" "$calls"
}

@test "a variable that contradicts the config file is rejected with the flag to use" {
  SSD_BATCH_SIZE=77 run_and_time
  [ "$status" -eq 2 ]
  [[ $output == *"SSD_BATCH_SIZE=77: config_toy.sh sets $batch"*"--batch-size 77"* ]]
  SSD_BATCH_SIZE=$batch SSD_SEED=5 run_and_time
  [ "$status" -eq 0 ]
}

@test "a dry run launches nothing and prints the launch line without --dry-run" {
  run_and_time --dry-run --seed 5
  [ "$status" -eq 0 ]
  [[ $output == *"launch: venv/bin/python -m detection.runtime.launch --nnodes 1 --nproc-per-node 1 -m ssd train --seed 5" ]]
  [[ $output != *STARTING* ]]
  grep -qF -- "-m ssd preflight --dry-run --seed 5" "$calls"
  [ "$(grep --count detection.runtime.launch "$calls")" -eq 0 ]
}

@test "--model-summary lists the layers once, also with several experiments, and launches nothing" {
  NEXP=3 run_and_time --model-summary --backbone resnet50
  [ "$status" -eq 0 ]
  [[ $output != *STARTING* ]]
  [ "$(grep --count python "$calls")" -eq 1 ]
  grep -qF -- "-m ssd summary --backbone resnet50 [" "$calls"
  PREFLIGHT=2 run_and_time --model-summary --typo
  [ "$status" -eq 2 ]
}

@test "--preflight launches the machine checks on all ranks, untimed, and exits with their status" {
  for expected in 0 2; do
    : >"$calls"
    STATUS=$expected DGXNGPU=2 run_and_time --preflight --batch-size 8
    [ "$status" -eq "$expected" ]
    [[ $output != *STARTING* && $output != *RESULT* ]]
    grep -q -- "--nproc-per-node 2 -m ssd inspect --batch-size 8 " "$calls"
    [ "$(grep --count 'ssd preflight' "$calls")" -eq 0 ]
  done
}

@test "--autotune passes all flags to the search and starts no run" {
  run_and_time --batch-size 8 --autotune 60 --name mine
  [ "$status" -eq 0 ]
  grep -q -- "python -m ssd tune --batch-size 8 --autotune 60 --name mine " "$calls"
  [[ $(<"$calls") != *launch* && $(<"$calls") != *preflight* ]]
}

@test "--help prints the usage and launches nothing" {
  run_and_time --help
  [ "$status" -eq 0 ]
  [[ $output == "usage: "*DGXSYSTEM*"exit status"* ]]
  grep -q -- "ssd train --help" "$calls"
  [ "$(grep --count launch "$calls")" -eq 0 ]
}

@test "the RESET_COMMAND of the config file runs before the timed part" {
  # shellcheck disable=SC2016 # expanded by the tool
  printf '#!/bin/sh\necho "reset $*" >>"$calls"\n' >"$folder/reset_tool"
  chmod +x "$folder/reset_tool"
  echo 'export RESET_COMMAND="./reset_tool --all && echo done"' >>"$folder/config_toy.sh"
  run_and_time
  [ "$status" -eq 0 ]
  grep -q "^reset --all$" "$calls"
  [[ $output == *done*STARTING* ]]
  [[ $(sed -n '/^reset/,$p' "$calls") == *detection.runtime.launch* ]]
  run_and_time --dry-run
  [ "$(grep --count ^reset "$calls")" -eq 1 ]
}

@test "a failed reset ends the script before the timed part, with its command and status" {
  RESET_COMMAND="exit 7" run_and_time
  [ "$status" -eq 2 ]
  [[ $output == *"error: RESET_COMMAND=exit 7: failed with status 7" ]]
  [[ $output != *STARTING* ]]
  [ "$(grep --count detection.runtime.launch "$calls")" -eq 0 ]
}

@test "a kept page cache is reported" {
  run_and_time
  [[ $output == *"Page cache kept: CLEAR_CACHES=0"* ]]
}

@test "an unprivileged user drops the page cache with sudo, or gets a message" {
  local nobody=()
  if ((EUID == 0)); then
    nobody=(setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs)
    chmod o+x "${BATS_RUN_TMPDIR:?}" "$BATS_FILE_TMPDIR" "$(dirname "$BATS_TEST_TMPDIR")"
  fi
  mkdir "$BATS_TEST_TMPDIR/bin"
  cat >"$BATS_TEST_TMPDIR/bin/sudo" <<'END'
#!/usr/bin/env bash
echo "sudo $*" >>"$calls"
exit "${SUDO:-0}"
END
  chmod +x "$BATS_TEST_TMPDIR/bin/sudo"
  chmod -R o+rwX "$BATS_TEST_TMPDIR"
  PATH=$BATS_TEST_TMPDIR/bin:$PATH CLEAR_CACHES=1 run "${nobody[@]}" "$folder/run_and_time.sh"
  [ "$status" -eq 0 ]
  [[ $output != *"Page cache kept"* ]]
  grep -qxF -- "sudo -n /sbin/sysctl -q vm.drop_caches=3" "$calls"
  grep -qF "/runs/this one, 1, data/toy" "$calls"
  SUDO=1 PATH=$BATS_TEST_TMPDIR/bin:$PATH CLEAR_CACHES=1 run "${nobody[@]}" "$folder/run_and_time.sh"
  [[ $output == *"Page cache kept: dropping it needs root, or sudo without a password"* ]]
  grep -qF "/runs/this one, 0, data/toy" "$calls"
}

@test "a page cache dropped outside the container is recorded as dropped" {
  PAGE_CACHE_DROPPED=1 run_and_time
  [[ $output != *"Page cache kept"* ]]
  grep -qF "/runs/this one, 1, data/toy" "$calls"
}

@test "a signal reaches the run, and the script exits with its status" {
  for signal in INT TERM; do
    rm -f "$BATS_TEST_TMPDIR/waits"
    sed -i "s/' [A-Z]*\$/' $signal/" "$folder/venv/bin/python"
    # A shell ignores SIGINT in background jobs. env restores the default.
    signal=$signal WAIT="$BATS_TEST_TMPDIR/waits" env --default-signal=INT "$folder/run_and_time.sh" >"$BATS_TEST_TMPDIR/out" 2>&1 3>&- &
    script=$!
    until [[ -s $BATS_TEST_TMPDIR/waits ]]; do sleep 0.05; done
    kill -s "$signal" "$script"
    status=0
    wait "$script" || status=$?
    [ "$status" -eq 130 ]
    grep -q "ended by $signal" "$BATS_TEST_TMPDIR/out"
    [ "$(grep --count RESULT "$BATS_TEST_TMPDIR/out")" -eq 0 ]
  done
}

@test "scheduler signals reach the run as SIGTERM, on which it saves a checkpoint" {
  for sent in USR1 HUP; do
    sed -i "s/' [A-Z]*\$/' TERM/" "$folder/venv/bin/python"
    rm -f "$BATS_TEST_TMPDIR/waits"
    signal=$sent WAIT="$BATS_TEST_TMPDIR/waits" env --default-signal="$sent" "$folder/run_and_time.sh" >"$BATS_TEST_TMPDIR/out" 2>&1 3>&- &
    script=$!
    until [[ -s $BATS_TEST_TMPDIR/waits ]]; do sleep 0.1; done
    kill -s "$sent" "$script"
    wait "$script" && status=0 || status=$?
    [ "$status" -eq 130 ]
    grep -q "SIG$sent: stopping the run" "$BATS_TEST_TMPDIR/out"
    grep -q "ended by $sent" "$BATS_TEST_TMPDIR/out"
  done
}

@test "the same signal again, unless at once, ends launcher and ranks, and writes no report" {
  signal=INT STUBBORN=1 WAIT="$BATS_TEST_TMPDIR/waits" env --default-signal=INT "$folder/run_and_time.sh" >"$BATS_TEST_TMPDIR/out" 2>&1 3>&- &
  script=$!
  until [[ -s $BATS_TEST_TMPDIR/waits ]]; do sleep 0.05; done
  rank=$(<"$BATS_TEST_TMPDIR/waits")
  kill -s INT "$script" && sleep 0.1
  kill -s INT "$script" && sleep 1 # a duplicate
  [[ $(<"/proc/$rank/stat") != *' Z '* ]]
  kill -s INT "$script"
  wait "$script" && status=0 || status=$?
  [ "$status" -eq 130 ]
  [[ ! -e /proc/$rank || $(<"/proc/$rank/stat") == *' Z '* ]]
  grep -q 'SIGINT: ended the run' "$BATS_TEST_TMPDIR/out"
  [ "$(grep --count ENDING "$BATS_TEST_TMPDIR/out")" -eq 0 ]
}

# in_shell REDIRECTION: runs the script with the redirection and prints its status.
in_shell() {
  bash -c "\"$folder/run_and_time.sh\" $1; echo \${PIPESTATUS[0]} >\"$BATS_TEST_TMPDIR/status\"" 3>&-
  echo "$(<"$BATS_TEST_TMPDIR/status")"
}

@test "output that cannot be written ends no run, and the report is written after it" {
  mkdir "$BATS_TEST_TMPDIR/run"
  echo '{}' >"$BATS_TEST_TMPDIR/run/metrics.jsonl"
  export RUN=$BATS_TEST_TMPDIR/run STATUS=3 RESET_COMMAND='echo reset'
  for redirection in '>/dev/full 2>&1' '>&- 2>&-' '2>&1 | true'; do
    : >"$calls"
    [ "$(in_shell "$redirection" | tail -n 1)" -eq 3 ]
    [[ $(tail -n 1 "$calls") == "python -m detection.report "* ]]
  done
}

@test "Ctrl-C reaches the run if the reader of the output has ended, or does not read" {
  # shellcheck disable=SC2016 # text of the stub
  sed -i 's/ echo "ended by $signal";//' "$folder/venv/bin/python"
  for reader in ended stuck; do
    rm -f "$BATS_TEST_TMPDIR"/{waits,pipe}
    mkfifo "$BATS_TEST_TMPDIR/pipe"
    exec 5<>"$BATS_TEST_TMPDIR/pipe"
    if [[ $reader == stuck ]]; then head -c 65536 /dev/zero >&5; fi
    signal=INT WAIT="$BATS_TEST_TMPDIR/waits" env --default-signal=INT "$folder/run_and_time.sh" >"$BATS_TEST_TMPDIR/pipe" 2>&1 3>&- 5>&- &
    script=$!
    if [[ $reader == ended ]]; then sleep 0.5 && exec 5>&-; fi
    until [[ -s $BATS_TEST_TMPDIR/waits ]]; do sleep 0.05; done
    kill -s INT "$script"
    wait "$script" && status=0 || status=$?
    [ "$status" -eq 130 ]
  done
}

# rejected NAME [NAME=value ...]: checks that the script ends with 2 and one line that begins with NAME=.
rejected() {
  run env "${@:2}" "$folder/run_and_time.sh"
  [[ $status -eq 2 && ${#lines[@]} -eq 1 && $output == "error: $1="* ]] || { echo "${*:2}: $status $output" && return 1; }
}

@test "variables that are no numbers in range are rejected by name, and never run as commands" {
  sed -i 's/DGXNNODES=1/DGXNNODES=2/' "$folder/config_toy.sh"
  command="a[\$(touch "$BATS_TEST_TMPDIR/pwned")]"
  for value in abc 08 -1 1.5 ' ' 0x1 99999999999; do
    rejected NODE_RANK NODE_RANK="$value" MASTER_ADDR=here
  done
  rejected NODE_RANK SLURM_NODEID="$command" MASTER_ADDR=here
  for name in NODE_RANK MASTER_PORT MAX_RESTARTS RUN_INDEX DGXNGPU SLURM_JOB_ID SLURM_STEP_NUM_NODES SLURM_STEP_NUM_TASKS; do
    rejected "$name" "$name=$command" MASTER_ADDR=here
  done
  rejected MASTER_PORT MASTER_PORT=70000 MASTER_ADDR=here
  rejected MASTER_PORT MASTER_PORT=65535 RUN_INDEX=1 MASTER_ADDR=here
  sed -i 's/DGXNNODES=2/DGXNNODES=08/' "$folder/config_toy.sh"
  rejected DGXNNODES MASTER_ADDR=here
  rejected DGXNNODES NEXP=2
  [ ! -e "$BATS_TEST_TMPDIR/pwned" ]
  [ "$(grep --count launch "$calls")" -eq 0 ]
}

@test "several Slurm tasks per node are rejected" {
  run env SLURM_STEP_NUM_TASKS=8 SLURM_STEP_NUM_NODES=1 "$folder/run_and_time.sh"
  [[ $status -eq 2 && $output == "error: Slurm started this SLURM_STEP_NUM_TASKS=8 times on SLURM_STEP_NUM_NODES=1 nodes."* ]]
  run env SLURM_STEP_NUM_TASKS=1 SLURM_STEP_NUM_NODES=1 "$folder/run_and_time.sh"
  [ "$status" -eq 0 ]
}

@test "NEXP runs the script again for each experiment, each with its port, and one RESULT line each" {
  sed -i 's/DGXNNODES=1/DGXNNODES=2/' "$folder/config_toy.sh"
  export MASTER_ADDR=node0
  RUN_DIR=$BATS_TEST_TMPDIR/run NEXP=3 run_and_time --seed 7
  [ "$status" -eq 0 ]
  [ "$(grep -o -e '--master-port [0-9]*' "$calls" | xargs)" = "--master-port 29500 --master-port 29501 --master-port 29502" ]
  [ "$(grep --count '^RESULT,' <<<"$output")" -eq 3 ]
  [[ $output == "Seeds: 7 to 9, one per experiment"*"experiment 3 of 3, in $BATS_TEST_TMPDIR/run/experiment_2"* ]]
  NEXP=2 run_and_time
  [[ $status -eq 2 && $output == "error: NEXP=2 on DGXNNODES=2 nodes: set the same RUN_DIR"* ]]
  NEXP=2 RUN_INDEX=1 run_and_time
  [[ $status -eq 2 && $output == "error: RUN_INDEX=1 names one run, but NEXP=2. Unset one of them" ]]
}

@test "without a Python outside the environment, NEXP gives one message" {
  mkdir "$BATS_TEST_TMPDIR/bin"
  for name in python3 python3.13 python3.12 python3.11; do
    printf '#!/bin/sh\nexit 127\n' >"$BATS_TEST_TMPDIR/bin/$name"
    chmod +x "$BATS_TEST_TMPDIR/bin/$name"
  done
  PATH=$BATS_TEST_TMPDIR/bin:$PATH NEXP=2 run_and_time
  [ "$status" -eq 2 ]
  [[ $output == "error: no Python 3.8 or newer on PATH, which runs the experiments. Install python3 or set PYTHON."* ]]
}

@test "a run that ends at --max-steps prints no RESULT" {
  mkdir -p "$BATS_TEST_TMPDIR/run"
  echo ':::MLLOG {"key": "run_stop", "value": null, "metadata": {"status": "aborted"}}' >"$BATS_TEST_TMPDIR/run/result_0.txt"
  RUN=$BATS_TEST_TMPDIR/run run_and_time --max-steps 3
  [ "$status" -eq 0 ]
  [[ $output == *"No RESULT line: the run stopped at --max-steps"* ]]
  [[ $output != *RESULT,* ]]
}

@test "a resumed run prints no RESULT" {
  mkdir -p "$BATS_TEST_TMPDIR/run"
  sed -i "s|/runs/this one|$BATS_TEST_TMPDIR/run|" "$folder/venv/bin/python"
  mllog_line resumed '' >"$BATS_TEST_TMPDIR/run/result_0.txt"
  run_and_time --resume auto
  [ "$status" -eq 0 ]
  [[ $output == *"No RESULT line: the run was resumed"* ]]
  [[ $output != *RESULT,* ]]
}

@test "modes other than training print no RESULT, and name the mode" {
  for mode in evaluate bench-train bench-infer; do
    MODE=$mode run_and_time --mode "$mode"
    [ "$status" -eq 0 ]
    [[ $output == *"No RESULT line: --mode $mode "*"/runs/this one"* ]]
    [[ $output != *RESULT,* ]]
  done
}

@test "restarts resume the run, and are rejected without --resume" {
  MAX_RESTARTS=2 run_and_time
  [ "$status" -eq 2 ]
  [[ $output == *"MAX_RESTARTS=2: pass --resume auto"* ]]
  MAX_RESTARTS=2 run_and_time --resume auto
  [ "$status" -eq 0 ]
  grep -q -- "--max-restarts 2 -m ssd train --resume auto" "$calls"
}

@test "several nodes need MASTER_ADDR, and only the first one prints RESULT" {
  sed -i 's/DGXNNODES=1/DGXNNODES=2/' "$folder/config_toy.sh"
  run_and_time
  [ "$status" -eq 2 ]
  [[ $output == *MASTER_ADDR* ]]
  MASTER_ADDR=node0 run_and_time
  [ "$status" -eq 0 ]
  [[ $output == *RESULT* ]]
  grep -q -- "--nnodes 2 --nproc-per-node 1 --node-rank 0 --master-addr node0 --master-port 29500 -m ssd train" "$calls"
  MASTER_ADDR=node0 MASTER_PORT=1234 NODE_RANK=1 run_and_time
  [ "$status" -eq 0 ]
  [[ $output != *RESULT* ]]
  grep -q -- "--node-rank 1 --master-addr node0 --master-port 1234" "$calls"
}

@test "node rank and first node come from Slurm" {
  sed -i 's/DGXNNODES=1/DGXNNODES=2/' "$folder/config_toy.sh"
  mkdir "$BATS_TEST_TMPDIR/bin"
  printf '#!/bin/sh\nprintf "%%s\\n" first second\n' >"$BATS_TEST_TMPDIR/bin/scontrol"
  chmod +x "$BATS_TEST_TMPDIR/bin/scontrol"
  PATH=$BATS_TEST_TMPDIR/bin:$PATH SLURM_JOB_NODELIST='[a-b]' SLURM_NODEID=1 run_and_time
  [ "$status" -eq 0 ]
  grep -q -- "--node-rank 1 --master-addr first " "$calls"
}
