#!/usr/bin/env bats
# run_with_docker.sh with a stub docker, which writes down its arguments, one a line.

load scripts

setup() {
  project="$BATS_TEST_TMPDIR/the project"
  bin=$BATS_TEST_TMPDIR/bin
  mkdir -p "$project/the data" "$bin"
  cp "$repository/run_with_docker.sh" "$project/"
  printf 'export %s\n' DGXNNODES=1 DGXNGPU=8 DATADIR="\${DATADIR:-data/coco}" >"$project/config_big.sh"
  printf 'export %s\n' DGXNNODES=1 DGXNGPU=1 SSD_DATASET=toy >"$project/config_toy.sh"
  printf 'export %s\n' DGXNNODES=2 >"$project/config_two.sh"
  export CALLS=$BATS_TEST_TMPDIR/calls
  cat >"$bin/docker" <<'END'
#!/usr/bin/env bash
case $1 in
  --version) echo "${VERSION:-Docker version 28}" ;;
  image) [[ $3 == detection ]] ;;
  run)
    printf '%s\n' "$@" --end-- >>"$CALLS"
    echo "output of the run"
    statuses=(${STATUSES:-0})
    exit "${statuses[$(grep --count '^--end--' "$CALLS") - 1]:-0}"
    ;;
esac
END
  chmod +x "$bin/docker"
  PATH=$bin:$PATH
  : >"$CALLS"
  export CONT=detection CLEAR_CACHES=0 DATESTAMP=now LOGDIR="$BATS_TEST_TMPDIR/the logs"
  unset DGXSYSTEM DATADIR NEXP PRETRAINED_DIR DOCKER
}

calls() {
  grep --count '^--end--' "$CALLS" || true
}

@test "five experiments by default, a log for each" {
  run "$project/run_with_docker.sh"
  [ "$status" -eq 0 ]
  [ "$(calls)" -eq 5 ]
  for i in 1 2 3 4 5; do grep --quiet 'output of the run' "$LOGDIR/now_$i.log"; done
}

@test "folders, system and flags reach the container, spaces and all" {
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

@test "experiments are counted from 0 and told whether the caches were dropped" {
  NEXP=2 run "$project/run_with_docker.sh"
  [ "$(grep '^EXPERIMENT=' "$CALLS" | xargs)" = "EXPERIMENT=0 EXPERIMENT=1" ]
  [ "$(grep '^CACHES_CLEARED=' "$CALLS" | xargs)" = "CACHES_CLEARED=0 CACHES_CLEARED=0" ]
}

@test "a run below the target does not end the others, and its status is kept" {
  STATUSES="0 3 0" NEXP=3 run "$project/run_with_docker.sh"
  [ "$status" -eq 3 ]
  [ "$(calls)" -eq 3 ]
}

@test "bad configuration ends all at the first" {
  STATUSES="2" NEXP=3 run "$project/run_with_docker.sh"
  [ "$status" -eq 2 ]
  [ "$(calls)" -eq 1 ]
}

@test "podman keeps the caller's user" {
  VERSION="podman version 5" NEXP=1 run "$project/run_with_docker.sh"
  grep --quiet --line-regexp -e --userns=keep-id "$CALLS"
}

@test "an absent image, system, data folder or count is one message and status 2" {
  CONT='' run "$project/run_with_docker.sh"
  [[ $status -eq 2 && $output == "error: CONT names no image."* ]]
  CONT=other run "$project/run_with_docker.sh"
  [[ $status -eq 2 && $output == "error: $bin/docker has no image other"* ]]
  DGXSYSTEM=none run "$project/run_with_docker.sh"
  [[ $status -eq 2 && $output == "error: DGXSYSTEM=none: there is no config_none.sh. There are: config_big.sh config_toy.sh config_two.sh"* ]]
  DGXSYSTEM=big run "$project/run_with_docker.sh"
  [[ $status -eq 2 && $output == "error: DATADIR=data/coco is no folder" ]]
  DGXSYSTEM=two run "$project/run_with_docker.sh"
  [[ $status -eq 2 && $output == "error: config_two.sh is for 2 nodes"* ]]
  NEXP=none run "$project/run_with_docker.sh"
  [[ $status -eq 2 && $output == "error: NEXP=none is no number"* ]]
  [ "$(calls)" -eq 0 ]
}
