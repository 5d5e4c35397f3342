#!/usr/bin/env bats
# Every command of docs/CLUSTER.md runs the real scripts, with stubs for the tools of a cluster and for the training.

load scripts

setup() {
  unset "${!SSD_@}" "${!DGX@}" "${!SLURM_@}" DATADIR LOGDIR RUN_DIR NODE_RANK MASTER_ADDR MASTER_PORT PAGE_CACHE_DROPPED \
    BENCHMARK RUN_INDEX NEXP CONT DATESTAMP PRETRAINED_DIR DOCKER REQUEUE
  # shellcheck disable=SC2154 # set in scripts.bash
  page=$repository/docs/CLUSTER.md
  folder="$BATS_TEST_TMPDIR/a clone"
  bin=$BATS_TEST_TMPDIR/bin
  mkdir -p "$folder/venv/bin" "$folder/scripts" "$bin"
  cp -r "$repository/scripts/lib" "$folder/scripts"
  cp "$repository"/{run_and_time,run_with_docker,config_toy,config_DGXA100,config_DGXA100_multi_2x8x56}.sh \
    "$repository/run.sub" "$folder"
  export CALLS=$BATS_TEST_TMPDIR/calls VENV=venv CLEAR_CACHES=0
  : >"$CALLS"
  printf '#!/bin/sh\n' >"$folder/setup.sh"
  cat >"$folder/venv/bin/python" <<'END_PYTHON'
#!/usr/bin/env bash
all=$*
if [[ $2 == detection.engine.experiments ]]; then exec python3 "$@"; fi
if [[ $3 == preflight ]]; then
  mkdir -p "${RUN_DIR:=run}" && printf '%s\n' Lab "$RUN_DIR" train 7
else
  echo "train $RUN_INDEX $RUN_DIR node $NODE_RANK ${all##*ssd train}" >>"$CALLS"
  mllog_line run_stop '"status": "success", "epoch_num": 1' >"$RUN_DIR/result_${RUN_INDEX:-0}.txt"
fi
END_PYTHON
  for name in docker sbatch scancel scontrol git; do
    # shellcheck disable=SC2016 # expanded by the stub
    printf '#!/bin/sh\ncase $1 in --version | image | rm) ;; *) echo "${0##*/} $*" >>"$CALLS" ;; esac\n' >"$bin/$name"
  done
  echo 'echo abc123' >>"$bin/git"
  chmod +x "$folder/setup.sh" "$folder/venv/bin/python" "$bin"/*
  PATH=$bin:$PATH
  cd "$folder" || return
  touch FILE
  mkdir -p coco
}

# commands SECTION: prints the commands of a section, with the test's folders instead of those at the root of a machine.
commands() {
  sed -n "/^## $1\$/,/^## /s/^\\$ //p" "$page" | sed "s| /| $BATS_TEST_TMPDIR/|g; s|=/data/coco|=coco|g; s|=/logs|=$BATS_TEST_TMPDIR/logs|g"
}

# run_section SECTION: runs its commands one after the other. Stops at the first that fails.
run_section() {
  local command
  while read -r command; do
    run bash -c "$command" </dev/null
    [ "$status" -eq 0 ] || { echo "$command: $output" && return 1; }
  done < <(commands "$1")
}

@test "every command of the page belongs to a tested section" {
  [ "$(grep --count '^\$ ' "$page")" -eq "$(for section in 'N runs' 'In containers' 'Several nodes without Slurm' Slurm; do commands "$section"; done | wc -l)" ]
}

@test "N runs: each command runs its experiments, and a removed experiment is repeated" {
  run_section 'N runs'
  [ "$(grep --count '^train' "$CALLS")" -eq 20 ]
  [ "$(grep --count ' results/five/' "$CALLS")" -eq 5 ]
  [ "$(grep -o -e '--seed [0-9]*$' "$CALLS" | xargs)" = "--seed 7 --seed 8 --seed 9 --seed 10 --seed 11" ]
  [ ! -e results/five/experiment_2 ]
  run bash -c "$(commands 'N runs' | sed -n 3p)"
  [ "$(tail -n 1 "$CALLS")" = "train 2 results/five/experiment_2 node 0 " ]
  [ "$(find results/five -name 'result_*.txt' -type l | wc -l)" -eq 5 ]
}

@test "containers: the commands build the image and start the runs in it" {
  run_section 'In containers'
  grep --quiet --line-regexp 'docker build -t detection --build-arg COMMIT=abc123 .' "$CALLS"
  [ "$(grep --count '^docker run' "$CALLS")" -eq 11 ]
  [ "$(grep --count 'RUN_DIR=/results/toy/ssd/2026-01-31_12-00-00/experiment_' "$CALLS")" -eq 5 ]
  tail -n 1 "$CALLS" | grep --quiet -e '--mode evaluate --weights /own/weights/FILE$'
}

@test "several nodes: each runs once, and the first one runs five experiments" {
  run_section 'Several nodes without Slurm'
  [ "$(grep --count 'node 0' "$CALLS")" -eq 6 ]
  [ "$(grep --count 'node 1' "$CALLS")" -eq 1 ]
  [ "$(find "$BATS_TEST_TMPDIR/logs/five" -name 'result_*.txt' -type l | wc -l)" -eq 5 ]
}

@test "Slurm: the commands submit the job, stop it and requeue it" {
  run_section Slurm
  [ "$(<"$CALLS")" = "sbatch --nodes=2 --time=100 run.sub
sbatch --nodes=2 --time=100 run.sub
scancel --signal=TERM --batch 42
scontrol requeue 42" ]
}
