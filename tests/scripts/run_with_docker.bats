#!/usr/bin/env bats
# run_with_docker.sh with a stub docker that logs its arguments, one per line.

load scripts

setup() {
  project="$BATS_TEST_TMPDIR/the project"
  bin=$BATS_TEST_TMPDIR/bin
  mkdir -p "$project/the data" "$project/scripts" "$bin"
  cp -r "$repository/scripts/lib" "$project/scripts"
  cp "$repository/run_with_docker.sh" "$project/"
  printf 'export %s\n' DGXNNODES=1 DGXNGPU=8 DATADIR="\${DATADIR:-data/coco}" >"$project/config_big.sh"
  printf 'export %s\n' DGXNNODES=1 DGXNGPU=1 SSD_DATASET=toy >"$project/config_toy.sh"
  printf 'export %s\n' DGXNNODES=1 SSD_DATASET=synthetic_coco DATADIR="\${DATADIR:-data/synthetic_coco}" >"$project/config_synthetic_coco.sh"
  printf 'export %s\n' DGXNNODES=2 >"$project/config_two.sh"
  export CALLS=$BATS_TEST_TMPDIR/calls
  cat >"$bin/docker" <<'END'
#!/usr/bin/env bash
case $1 in
  --version) echo "${VERSION:-Docker version 28}" ;;
  image) [[ $3 == detection ]] ;;
  stop) echo "$*" >>"$CALLS.ends" && touch "$CALLS.stop" ;;
  rm) echo "$*" >>"$CALLS.ends" ;;
  run)
    printf '%s\n' "$@" --end-- >>"$CALLS"
    echo "output of the run"
    number=$(sed -n 's/^RUN_INDEX=//p' "$CALLS" | tail -n 1)
    if [[ $number == "${WAIT:-}" && ! -e $CALLS.waits ]]; then
      touch "$CALLS.waits"
      until [[ -e $CALLS.stop ]]; do sleep 0.05; done
      exit 143
    fi
    run=$LOGDIR/$(sed -n 's|^RUN_DIR=/results/||p' "$CALLS" | tail -n 1)
    mkdir -p "$run"
    if [[ -z ${STATUSES:-} ]]; then
      mllog_line run_stop '"status": "success", "epoch_num": 1' >"$run/result_$number.txt"
    fi
    statuses=(${STATUSES:-0})
    exit "${statuses[$(grep --count '^--end--' "$CALLS") - 1]:-0}"
    ;;
esac
END
  chmod +x "$bin/docker"
  PATH=$bin:$PATH
  : >"$CALLS"
  export CONT=detection CLEAR_CACHES=0 DATESTAMP=now LOGDIR="$BATS_TEST_TMPDIR/the logs"
  unset "${!SSD_@}" DGXSYSTEM DATADIR NEXP PRETRAINED_DIR DOCKER BENCHMARK
}

calls() {
  grep --count '^--end--' "$CALLS" || true
}

@test "five experiments by default, each with a log" {
  run "$project/run_with_docker.sh"
  [ "$status" -eq 0 ]
  [ "$(calls)" -eq 5 ]
  for i in 1 2 3 4 5; do grep --quiet 'output of the run' "$LOGDIR/now_$i.log"; done
}

@test "folders, system and flags reach the container, even with spaces" {
  cd "$project"
  mkdir weights
  DGXSYSTEM=big DATADIR="the data" PRETRAINED_DIR=weights NEXP=1 run ./run_with_docker.sh --batch-size 8 --note "a b"
  [ "$status" -eq 0 ]
  grep --quiet --line-regexp "type=bind,source=$project/the data,target=/data,readonly" "$CALLS"
  grep --quiet --line-regexp "type=bind,source=$project/weights,target=/pretrained,readonly" "$CALLS"
  grep --quiet --line-regexp "type=bind,source=$LOGDIR,target=/results" "$CALLS"
  grep --quiet --line-regexp 'DATADIR=/data' "$CALLS"
  [ "$(tail -n 7 "$CALLS" | xargs)" = "detection ./run_and_time.sh --batch-size 8 --note a b --end--" ]
}

@test "experiments count from 0 and record whether the page cache was dropped" {
  NEXP=2 run "$project/run_with_docker.sh"
  [ "$(grep '^RUN_INDEX=' "$CALLS" | xargs)" = "RUN_INDEX=0 RUN_INDEX=1" ]
  [ "$(grep '^PAGE_CACHE_DROPPED=' "$CALLS" | xargs)" = "PAGE_CACHE_DROPPED=0 PAGE_CACHE_DROPPED=0" ]
}

@test "podman keeps the caller's user ID" {
  VERSION="podman version 5" NEXP=1 run "$project/run_with_docker.sh"
  grep --quiet --line-regexp -e --userns=keep-id "$CALLS"
}

@test "a missing image, system, data folder or count gives one message and status 2" {
  CONT='' run "$project/run_with_docker.sh"
  [[ $status -eq 2 && $output == "error: CONT is not set."* ]]
  CONT=other run "$project/run_with_docker.sh"
  [[ $status -eq 2 && $output == "error: $bin/docker has no image other"* ]]
  DGXSYSTEM=none run "$project/run_with_docker.sh"
  [[ $status -eq 2 && $output == "error: DGXSYSTEM=none: config_none.sh does not exist. Available: config_big.sh config_synthetic_coco.sh config_toy.sh config_two.sh"* ]]
  DGXSYSTEM=big run "$project/run_with_docker.sh"
  [[ $status -eq 2 && $output == "error: DATADIR=data/coco is not a folder" ]]
  DGXSYSTEM=two run "$project/run_with_docker.sh"
  [[ $status -eq 2 && $output == "error: config_two.sh is for 2 nodes"* ]]
  NEXP=none run "$project/run_with_docker.sh"
  [[ $status -eq 2 && $output == "error: NEXP=none is not a valid number"* ]]
  [ "$(calls)" -eq 0 ]
}

@test "custom data, weights and a backbone are mounted read-only, and flags name the paths in the container" {
  mkdir "$project/my images" "$project/val"
  touch "$project/my train.json" "$project/val.json" "$BATS_TEST_TMPDIR/some weights.pt" "$project/backbone.pth"
  DGXSYSTEM=big NEXP=1 run "$project/run_with_docker.sh" --train-images "my images" --train-annotations="my train.json" \
    --val-images val --val-annotations val.json --weights "$BATS_TEST_TMPDIR/some weights.pt" --pretrained-backbone backbone.pth
  [ "$status" -eq 0 ]
  for pair in "my images,target=/own/train-images" "my train.json,target=/own/train-annotations/my train.json" \
    "val,target=/own/val-images" "val.json,target=/own/val-annotations/val.json" "backbone.pth,target=/own/pretrained-backbone/backbone.pth"; do
    grep --quiet --line-regexp "type=bind,source=$project/$pair,readonly" "$CALLS"
  done
  grep --quiet --line-regexp "type=bind,source=$BATS_TEST_TMPDIR/some weights.pt,target=/own/weights/some weights.pt,readonly" "$CALLS"
  [ "$(sed -n '/^detection$/,$p' "$CALLS" | xargs)" = "detection ./run_and_time.sh --train-images /own/train-images \
--train-annotations /own/train-annotations/my train.json --val-images /own/val-images --val-annotations /own/val-annotations/val.json \
--weights /own/weights/some weights.pt --pretrained-backbone /own/pretrained-backbone/backbone.pth --end--" ]
  [ "$(grep --count 'target=/data' "$CALLS")" -eq 0 ] # DATADIR is not needed
}

@test "an empty backbone stays empty, and the folder of a summary is writable" {
  NEXP=2 run "$project/run_with_docker.sh" --pretrained-backbone '' --summary-json "$BATS_TEST_TMPDIR/sums/speed.json"
  [ "$status" -eq 0 ]
  grep --quiet --line-regexp "type=bind,source=$BATS_TEST_TMPDIR/sums,target=/own/summary-json" "$CALLS"
  [ "$(grep -o '^/own/summary-json/speed_.*' "$CALLS" | xargs)" = "/own/summary-json/speed_0.json /own/summary-json/speed_1.json" ]
  [ "$(grep --after-context=1 -e --pretrained-backbone "$CALLS" | sed -n 2p)" = "" ]
}

@test "a synthetic data set is kept outside the container, in a writable folder" {
  DGXSYSTEM=synthetic_coco NEXP=1 run "$project/run_with_docker.sh"
  [ "$status" -eq 0 ]
  [ -d "$project/data/synthetic_coco" ]
  grep --quiet --line-regexp "type=bind,source=$project/data/synthetic_coco,target=/data" "$CALLS"
}

@test "missing files and names that cannot be mounted give one message and status 2" {
  run "$project/run_with_docker.sh" --weights nowhere.pt
  [[ $status -eq 2 && $output == "error: --weights nowhere.pt is not a file" ]]
  run "$project/run_with_docker.sh" --val-images nowhere
  [[ $status -eq 2 && $output == "error: --val-images=nowhere is not a folder" ]]
  mkdir "$project/a,b"
  run "$project/run_with_docker.sh" --val-images a,b
  [[ $status -eq 2 && $output == "error: $project/a,b: a path with a comma or a colon cannot be mounted"* ]]
  [ "$(calls)" -eq 0 ]
}

@test "all experiments share a run folder and use different seeds" {
  NEXP=3 run "$project/run_with_docker.sh" --seed 7
  [ "$(grep '^RUN_DIR=' "$CALLS" | xargs)" = "RUN_DIR=/results/toy/ssd/now/experiment_0 RUN_DIR=/results/toy/ssd/now/experiment_1 RUN_DIR=/results/toy/ssd/now/experiment_2" ]
  [ "$(grep --after-context=1 -e --seed "$CALLS" | grep '^[0-9]' | xargs)" = "7 7 7 8 7 9" ]
  for i in 0 1 2; do grep --quiet run_stop "$LOGDIR/toy/ssd/now/result_$i.txt"; done
}

@test "the others run after a failed experiment, but a container that cannot start stops all" {
  STATUSES="0 0 137 0 3" run "$project/run_with_docker.sh"
  [ "$status" -eq 137 ]
  [ "$(calls)" -eq 5 ]
  : >"$CALLS"
  DATESTAMP=other STATUSES="125" run "$project/run_with_docker.sh"
  [[ $status -eq 125 && $(calls) -eq 1 ]]
}

@test "a signal gives the container time to save and removes it, and the same command resumes at the third of five" {
  for signal in INT TERM HUP; do
    rm -f "$CALLS".* && : >"$CALLS"
    export DATESTAMP="on $signal"
    WAIT=2 env --default-signal=INT "$project/run_with_docker.sh" --seed 7 >"$BATS_TEST_TMPDIR/out" 2>&1 3>&- &
    script=$!
    until [[ -e $CALLS.waits ]]; do sleep 0.05; done
    kill -s "$signal" "$script"
    wait "$script" && status=0 || status=$?
    [ "$status" -eq 143 ]
    [ "$(calls)" -eq 3 ]
    container=$(grep --after-context=1 --line-regexp -e --name "$CALLS" | tail -n 1)
    [ "$(tail -n 2 "$CALLS.ends")" = "stop -t 120 $container
rm --force $container" ]
    grep --quiet --fixed-strings "To continue: DATESTAMP='on $signal' NEXP=5" "$BATS_TEST_TMPDIR/out"
    : >"$CALLS"
    run "$project/run_with_docker.sh" --seed 7
    [ "$status" -eq 0 ]
    [ "$(grep '^RUN_INDEX=' "$CALLS" | xargs)" = "RUN_INDEX=2 RUN_INDEX=3 RUN_INDEX=4" ]
  done
}

@test "no terminal is requested, and the caller's user owns the files" {
  NEXP=1 run "$project/run_with_docker.sh" </dev/null
  [ "$(grep --count --line-regexp -e '-it\|-t\|--tty\|-i\|--interactive' "$CALLS")" -eq 0 ]
  grep --quiet --line-regexp "$(id -u):$(id -g)" "$CALLS"
}
