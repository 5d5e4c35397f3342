#!/usr/bin/env bats
# The script in a folder of its own, with stubs for what it calls: setup.sh and the environment's python.

load scripts

setup() {
  unset "${!SSD_@}" "${!DGX@}" "${!SLURM_@}" DATADIR LOGDIR RUN_DIR NODE_RANK MASTER_ADDR MASTER_PORT PAGE_CACHE_DROPPED \
    OMP_NUM_THREADS BENCHMARK RESET_COMMAND NEXP RUN_INDEX
  folder="$BATS_TEST_TMPDIR/a clone"
  mkdir -p "$folder/venv/bin"
  cp "$repository/run_and_time.sh" "$repository"/{series,systems}.sh "$repository"/config_*.sh "$folder"
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
echo "python $* [$SSD_BATCH_SIZE, $RUN_DIR, $PAGE_CACHE_DROPPED, $DATADIR]" >>"$calls"
case $2 in
  *.preflight) [[ ${PREFLIGHT:-0} == 0 ]] && printf '%s\n' "Some Lab" "${RUN:-/runs/this one}" "${MODE:-train}" 7 || exit "$PREFLIGHT" ;;
  detection.evaluation.sample_predictions | detection.report.html_report) exit "${REPORT:-0}" ;;
  detection.runtime.launch)
    echo "$SSD_NUM_CLASSES" >"$calls.classes"
    if [[ -n ${WAIT:-} ]]; then
      trap 'kill %1; echo "ended by $signal"; exit 130' INT
      sleep 60 3>&- &
      touch "$WAIT"
      wait
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

@test "a run that reaches its target prints one RESULT with organisation and start" {
  run_and_time --org x
  [ "$status" -eq 0 ]
  start=$(sed -n 's/^STARTING TIMING RUN AT //p' <<<"$output")
  [[ $start =~ ^[0-9]{4}-[0-9]{2}-[0-9]{2}\ [0-9]{2}:[0-9]{2}:[0-9]{2}\ [AP]M$ ]]
  [ "$(grep --count '^ENDING TIMING RUN AT ' <<<"$output")" -eq 1 ]
  [ "$(grep --count RESULT <<<"$output")" -eq 1 ]
  [[ $(grep RESULT <<<"$output") =~ ^RESULT,SINGLE_STAGE_DETECTOR,,[0-9]+,Some\ Lab,"$start"$ ]]
}

@test "the environment is made, the input checked and the run launched, in this order and with the flags" {
  run_and_time --name "two words"
  [ "$(sed 's/ .*preflight.*/ preflight/; s/ -m detection.*/ launch/' "$calls")" = "$(printf 'setup --quiet\npython preflight\npython launch')" ]
  grep -qF -- "-m ssd.preflight --name two words [$batch, , , data/toy]" "$calls"
  [ "$(<"$calls.classes")" -eq 7 ] # as the checks counted them
  grep -qF -- "-m detection.runtime.launch --nnodes 1 --nproc-per-node 1 -m ssd.train --name two words [$batch, /runs/this one, 0, data/toy]" "$calls"
}

@test "no RESULT follows a failure, whose status is the script's" {
  for expected in 1 2 3 137; do
    STATUS=$expected run_and_time
    [ "$status" -eq "$expected" ]
    [[ $output != *RESULT* ]]
    [[ $output == *ENDING* ]]
  done
}

@test "every run that has begun is reported on after its clock, and a report that fails changes nothing" {
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
      [ "$(grep --count 'warning: no report' <<<"$output")" -eq "$REPORT" ]
      [[ $(tail -1 "$calls") == "python -m detection.report.html_report $RUN ["* ]]
      [ "$(grep --count showcase "$calls")" -eq 0 ] # there are no detections to show
    done
  done
  echo '[]' >"$RUN/detections.json"
  run_and_time
  [ "$(sed -n 's/python -m \([a-z.]*\) .*/\1/p' "$calls" | tail -3)" = "$(printf 'detection.runtime.launch\ndetection.showcase\nmlperf.report')" ]
}

@test "a run that has not begun, and all nodes but the first, have no report" {
  run_and_time
  export RUN=$BATS_TEST_TMPDIR
  : >"$RUN/metrics.jsonl"
  run_and_time
  echo '{}' >"$RUN/metrics.jsonl"
  DGXSYSTEM=DGXA100_multi_2x8x56 NODE_RANK=1 MASTER_ADDR=there run_and_time
  [ "$(grep --count launch "$calls")" -eq 3 ]
  [ "$(grep --count report "$calls")" -eq 0 ]
}

@test "a mistake found before the clock ends the script with 2" {
  PREFLIGHT=2 run_and_time
  [ "$status" -eq 2 ]
  [[ $output != *STARTING* ]]
  [ "$(grep --count launch "$calls")" -eq 0 ]
}

@test "an unknown system is refused with the list of those there are" {
  DGXSYSTEM=DGX9 run_and_time
  [ "$status" -eq 2 ]
  [[ $output == *DGX9*config_DGX1.sh*config_toy.sh* ]]
}

@test "an unknown benchmark is refused" {
  BENCHMARK=bert run_and_time
  [ "$status" -eq 2 ]
  [[ $output == *"BENCHMARK=bert"* ]]
}

@test "DGXSYSTEM picks the config file, and the user's folder and ranks are kept" {
  DGXSYSTEM=DGX1 DATADIR=/my/coco DGXNGPU=4 run_and_time
  [ "$status" -eq 0 ]
  grep -q -- "--nproc-per-node 4 .* \[120, .*, /my/coco\]" "$calls"
}

@test "a variable that contradicts the config file is refused with the flag to use" {
  SSD_BATCH_SIZE=77 run_and_time
  [ "$status" -eq 2 ]
  [[ $output == *"SSD_BATCH_SIZE=77: config_toy.sh says $batch"*"--batch-size 77"* ]]
  SSD_BATCH_SIZE=$batch SSD_SEED=5 run_and_time
  [ "$status" -eq 0 ]
}

@test "a dry run launches nothing and prints the launch line without its own flag" {
  run_and_time --dry-run --seed 5
  [ "$status" -eq 0 ]
  [[ $output == *"launch: venv/bin/python -m detection.runtime.launch --nnodes 1 --nproc-per-node 1 -m ssd.train --seed 5" ]]
  [[ $output != *STARTING* ]]
  grep -qF -- "-m ssd.preflight --dry-run --seed 5" "$calls"
  [ "$(grep --count detection.runtime.launch "$calls")" -eq 0 ]
}

@test "--model-summary lists the layers once, of several experiments too, and launches nothing" {
  NEXP=3 run_and_time --model-summary --backbone resnet50
  [ "$status" -eq 0 ]
  [[ $output != *STARTING* ]]
  [ "$(grep --count python "$calls")" -eq 1 ]
  grep -qF -- "-m ssd.preflight --model-summary --backbone resnet50 [" "$calls"
  PREFLIGHT=2 run_and_time --model-summary --typo
  [ "$status" -eq 2 ]
}

@test "--preflight launches the inspection on all ranks, without the clock, and ends with its status" {
  for expected in 0 2; do
    : >"$calls"
    STATUS=$expected DGXNGPU=2 run_and_time --preflight --batch-size 8
    [ "$status" -eq "$expected" ]
    [[ $output != *STARTING* && $output != *RESULT* ]]
    grep -q -- "--nproc-per-node 2 -m ssd.inspection --batch-size 8 " "$calls"
    [ "$(grep --count ssd.preflight "$calls")" -eq 0 ]
  done
}

@test "--autotune hands all flags to the tuning, which starts no run" {
  run_and_time --batch-size 8 --autotune 60 --name mine
  [ "$status" -eq 0 ]
  grep -q -- "python -m ssd.tune --batch-size 8 --autotune 60 --name mine " "$calls"
  [[ $(<"$calls") != *launch* && $(<"$calls") != *preflight* ]]
}

@test "--help says how to call it and launches nothing" {
  run_and_time --help
  [ "$status" -eq 0 ]
  [[ $output == "usage: "*DGXSYSTEM*"exit status"* ]]
  grep -q -- "ssd.preflight --help" "$calls"
  [ "$(grep --count launch "$calls")" -eq 0 ]
}

@test "the accelerators are reset before the clock, by the command of the config file" {
  # shellcheck disable=SC2016 # for the tool to expand
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

@test "a reset that fails ends the script with its command and status, before the clock" {
  RESET_COMMAND="exit 7" run_and_time
  [ "$status" -eq 2 ]
  [[ $output == *"error: RESET_COMMAND=exit 7: it ended with status 7" ]]
  [[ $output != *STARTING* ]]
  [ "$(grep --count detection.runtime.launch "$calls")" -eq 0 ]
}

@test "caches that are kept are said to be" {
  run_and_time
  [[ $output == *"caches are kept: CLEAR_CACHES=0"* ]]
}

@test "who may not drop the caches drops them by sudo, or is told" {
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
  [[ $output != *"are kept"* ]]
  grep -qxF -- "sudo -n /sbin/sysctl -q vm.drop_caches=3" "$calls"
  grep -qF "/runs/this one, 1, data/toy" "$calls"
  SUDO=1 PATH=$BATS_TEST_TMPDIR/bin:$PATH CLEAR_CACHES=1 run "${nobody[@]}" "$folder/run_and_time.sh"
  [[ $output == *"caches are kept: dropping them needs root, or sudo without a password"* ]]
  grep -qF "/runs/this one, 0, data/toy" "$calls"
}

@test "caches dropped outside a container are passed on as dropped" {
  PAGE_CACHE_DROPPED=1 run_and_time
  [[ $output != *"are kept"* ]]
  grep -qF "/runs/this one, 1, data/toy" "$calls"
}

@test "a signal reaches the run, whose status is the script's" {
  for signal in INT TERM; do
    rm -f "$BATS_TEST_TMPDIR/waits"
    sed -i "s/' [A-Z]*\$/' $signal/" "$folder/venv/bin/python"
    # env gives back the default for SIGINT, which a shell takes from what it starts in the background.
    signal=$signal WAIT="$BATS_TEST_TMPDIR/waits" env --default-signal=INT "$folder/run_and_time.sh" >"$BATS_TEST_TMPDIR/out" 2>&1 3>&- &
    script=$!
    until [[ -e $BATS_TEST_TMPDIR/waits ]]; do sleep 0.05; done
    kill -s "$signal" "$script"
    status=0
    wait "$script" || status=$?
    [ "$status" -eq 130 ]
    grep -q "ended by $signal" "$BATS_TEST_TMPDIR/out"
    [ "$(grep --count RESULT "$BATS_TEST_TMPDIR/out")" -eq 0 ]
  done
}

@test "the signals of a scheduler reach the run as SIGTERM, for which it saves" {
  for signal in USR1 HUP; do
    sed -i "s/' [A-Z]*\$/' TERM/" "$folder/venv/bin/python"
    rm -f "$BATS_TEST_TMPDIR/waits"
    signal=$signal WAIT="$BATS_TEST_TMPDIR/waits" "$folder/run_and_time.sh" >"$BATS_TEST_TMPDIR/out" 2>&1 3>&- &
    script=$!
    until [ -f "$BATS_TEST_TMPDIR/waits" ]; do sleep 0.1; done
    kill -s "$signal" "$script"
    wait "$script" && status=0 || status=$?
    [ "$status" -eq 130 ]
    grep -q "SIG$signal: ending the run" "$BATS_TEST_TMPDIR/out"
    grep -q "ended by $signal" "$BATS_TEST_TMPDIR/out"
  done
}

@test "a run that was resumed reaches its target without a RESULT" {
  mkdir -p "$BATS_TEST_TMPDIR/run"
  sed -i "s|/runs/this one|$BATS_TEST_TMPDIR/run|" "$folder/venv/bin/python"
  echo ':::MLLOG {"key": "resumed", "value": null}' >"$BATS_TEST_TMPDIR/run/result_0.txt"
  run_and_time --resume auto
  [ "$status" -eq 0 ]
  [[ $output == *"No RESULT line: the run was resumed"* ]]
  [[ $output != *RESULT,* ]]
}

@test "another mode than training ends without a RESULT, and says what it was" {
  for mode in evaluate bench-train bench-infer; do
    MODE=$mode run_and_time --mode "$mode"
    [ "$status" -eq 0 ]
    [[ $output == *"No RESULT line: --mode $mode "*"/runs/this one"* ]]
    [[ $output != *RESULT,* ]]
  done
}

@test "restarts go on with the run, and are refused where they would begin anew" {
  MAX_RESTARTS=2 run_and_time
  [ "$status" -eq 2 ]
  [[ $output == *"MAX_RESTARTS=2: pass --resume auto"* ]]
  MAX_RESTARTS=2 run_and_time --resume auto
  [ "$status" -eq 0 ]
  grep -q -- "--max-restarts 2 -m ssd.train --resume auto" "$calls"
}

@test "several nodes need an address, and only the first prints RESULT" {
  sed -i 's/DGXNNODES=1/DGXNNODES=2/' "$folder/config_toy.sh"
  run_and_time
  [ "$status" -eq 2 ]
  [[ $output == *MASTER_ADDR* ]]
  MASTER_ADDR=node0 run_and_time
  [ "$status" -eq 0 ]
  [[ $output == *RESULT* ]]
  grep -q -- "--nnodes 2 --nproc-per-node 1 --node-rank 0 --master-addr node0 --master-port 29500 -m ssd.train" "$calls"
  MASTER_ADDR=node0 MASTER_PORT=1234 NODE_RANK=1 run_and_time
  [ "$status" -eq 0 ]
  [[ $output != *RESULT* ]]
  grep -q -- "--node-rank 1 --master-addr node0 --master-port 1234" "$calls"
}

@test "Slurm says which node this is and which is the first" {
  sed -i 's/DGXNNODES=1/DGXNNODES=2/' "$folder/config_toy.sh"
  mkdir "$BATS_TEST_TMPDIR/bin"
  printf '#!/bin/sh\nprintf "%%s\\n" first second\n' >"$BATS_TEST_TMPDIR/bin/scontrol"
  chmod +x "$BATS_TEST_TMPDIR/bin/scontrol"
  PATH=$BATS_TEST_TMPDIR/bin:$PATH SLURM_JOB_NODELIST='[a-b]' SLURM_NODEID=1 run_and_time
  [ "$status" -eq 0 ]
  grep -q -- "--node-rank 1 --master-addr first " "$calls"
}
