#!/usr/bin/env bats
# run.sub, and run_and_time.sh in its jobs, with stubs of Slurm's commands that log their arguments, one per line.
# tests/engine/test_slurm.py uses a real Slurm.

load scripts

setup() {
  unset RUN_INDEX "${!SSD_@}" "${!DGX@}" "${!SLURM_@}" DATADIR LOGDIR NEXP PRETRAINED_DIR CONT DATESTAMP REQUEUE BENCHMARK
  project="$BATS_TEST_TMPDIR/the project"
  bin=$BATS_TEST_TMPDIR/bin
  mkdir -p "$project/the data" "$project/scripts" "$bin"
  cp -r "$repository/scripts/lib" "$project/scripts"
  cp "$repository"/{run.sub,run_and_time.sh} "$project/"
  printf 'export %s\n' DGXNNODES=2 DGXNGPU=8 WALLTIME=00:20:30 DATADIR="\${DATADIR:-data/coco}" SSD_BATCH_SIZE=7 >"$project/config_pair.sh"
  printf 'export %s\n' DGXNNODES=1 DGXNGPU=1 WALLTIME=2-01:00:00 SSD_DATASET=toy >"$project/config_toy.sh"
  printf 'export %s\n' DGXNNODES=1 WALLTIME=soon >"$project/config_soon.sh"
  export CALLS=$BATS_TEST_TMPDIR/calls RUNS=$BATS_TEST_TMPDIR/runs
  : >"$CALLS"
  : >"$RUNS"
  cat >"$bin/sbatch" <<'END'
#!/usr/bin/env bash
printf '%s\n' "${0##*/}" "$@" --end-- >>"$CALLS"
END
  cat >"$bin/scontrol" <<'END'
#!/usr/bin/env bash
case "$*" in
  requeue*) printf '%s\n' scontrol "$@" --end-- >>"$CALLS" ;;
  "show hostnames n[0-1]") printf '%s\n' n0 n1 ;;
  "show node n0") printf '%s\n' 'NodeName=n0 Arch=x86_64' '   NodeAddr=10.0.0.7 NodeHostName=host' ;;
  *) exit 1 ;;
esac
END
  cat >"$bin/squeue" <<'END'
#!/usr/bin/env bash
echo "${STATE:-RUNNING}"
END
  cat >"$bin/srun" <<'END'
#!/usr/bin/env bash
printf '%s\n' srun "$@" --end-- >>"$CALLS"
if [[ $* == *drop_caches* ]]; then exit "${CACHES:-0}"; fi
all=$*
echo "$RUN_INDEX $PAGE_CACHE_DROPPED $RUN_DIR [$DATADIR]${all##*run_and_time.sh}" >>"$RUNS"
echo "output of the run${ECHO_LOG:+ and the MLPerf log}"
if [[ -n ${WAIT:-} ]]; then
  trap 'kill %1; echo "srun got USR1"; exit 143' USR1
  sleep 60 3>&- &
  touch "$WAIT"
  wait
fi
statuses=(${STATUSES:-0})
exit "${statuses[RUN_INDEX]:-0}"
END
  chmod +x "$bin"/*
  PATH=$bin:$PATH
  export DGXSYSTEM=pair CLEAR_CACHES=0 LOGDIR="$BATS_TEST_TMPDIR/the logs"
}

# job [flags]: runs run.sub as slurmd does: a copy in another folder, called from the project's folder.
job() {
  cp "$project/run.sub" "$BATS_TEST_TMPDIR/slurm_script"
  cd "$project" || return
  export SLURM_JOB_ID=42 SLURM_JOB_NUM_NODES=${SLURM_JOB_NUM_NODES:-2}
  run "$BATS_TEST_TMPDIR/slurm_script" "$@"
}

@test "outside a job it submits itself, with the nodes of the config file and NEXP times its WALLTIME" {
  NEXP=3 run "$project/run.sub" --seed 5
  [ "$status" -eq 0 ]
  [ "$(xargs <"$CALLS")" = "sbatch --nodes=2 --time=63 run.sub --seed 5 --end--" ]
  : >"$CALLS"
  NEXP=1 DGXSYSTEM=toy run "$project/run.sub"
  [ "$(xargs <"$CALLS")" = "sbatch --nodes=1 --time=2940 run.sub --end--" ]
}

@test "five experiments by default, each with a log and a folder, one task per node" {
  job --seed 5
  [ "$status" -eq 0 ]
  [ "$(grep --count --line-regexp srun "$CALLS")" -eq 5 ]
  for i in 1 2 3 4 5; do
    [ "$(<"$LOGDIR/job_42_$i.log")" = "output of the run and the MLPerf log" ]
    grep --quiet --line-regexp -e "$((i - 1)) 0 $LOGDIR/pair/ssd/job_42/experiment_$((i - 1)) \[\] --seed 5 --seed $((i + 4))" "$RUNS"
  done
  [ "$(head -n 5 "$CALLS" | xargs)" = "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --mpi=none" ]
}

@test "DATESTAMP names the logs" {
  DATESTAMP=now NEXP=1 job
  [ -s "$LOGDIR/now_1.log" ]
}

@test "every node drops its page cache before each experiment, and the run records it" {
  CLEAR_CACHES=1 NEXP=2 job
  [ "$(grep --count drop_caches "$CALLS")" -eq 2 ]
  [ "$(cut -d ' ' -f 2 "$RUNS" | xargs)" = "1 1" ]
  [ "$(head -n 6 "$CALLS" | xargs)" = "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --mpi=none bash" ]
  CACHES=1 CLEAR_CACHES=1 NEXP=1 job
  [[ $output == *"could not drop the page cache"* ]]
  [ "$(tail -n 1 "$RUNS" | cut -d ' ' -f 2)" = 0 ]
}

# without_spaces: renames the test's folders, since pyxis mounts no path with a space.
without_spaces() {
  mv "$project" "$BATS_TEST_TMPDIR/project"
  project=$BATS_TEST_TMPDIR/project LOGDIR=$BATS_TEST_TMPDIR/logs
}

@test "with an image, pyxis mounts the folders and flags name the paths in the container" {
  without_spaces
  mkdir "$project/weights" "$project/data"
  CONT=image.sqsh DATADIR=data PRETRAINED_DIR=weights NEXP=1 job --note "a b"
  [ "$status" -eq 0 ]
  grep --quiet --line-regexp -e '--container-image=image.sqsh' "$CALLS"
  grep --quiet --line-regexp -e "--container-mounts=$LOGDIR:/results:rw,$project/data:/data:ro,$project/weights:/pretrained:ro" "$CALLS"
  [ "$(<"$RUNS")" = "0 0 /results/pair/ssd/job_42/experiment_0 [/data] --note a b" ]
  CONT=image.sqsh DATADIR=nowhere NEXP=1 job
  [[ $status -eq 2 && $output == "error: DATADIR=nowhere is not a folder" ]]
  DGXSYSTEM=toy SLURM_JOB_NUM_NODES=1 CONT=image.sqsh NEXP=1 job
  [ "$(tail -n 1 "$RUNS")" = "0 0 /results/toy/ssd/job_42/experiment_0 [/tmp/toy]" ]
}

@test "with an image, a path with a space is rejected, which pyxis cannot mount" {
  CONT=image.sqsh NEXP=1 job
  [[ $status -eq 2 && $output == "error: $LOGDIR: pyxis cannot mount a path with a space. Rename it" ]]
  without_spaces
  touch "$project/my weights.pt"
  CONT=image.sqsh DATADIR=. NEXP=1 job --weights "my weights.pt"
  [[ $status -eq 2 && $output == "error: $project/my weights.pt: pyxis cannot mount a path with a space. Rename it" ]]
  [ ! -s "$RUNS" ]
}

@test "with an image, files that the flags name are mounted, and flags name the paths in the container" {
  without_spaces
  mkdir "$project/images"
  touch "$project/a.json" "$BATS_TEST_TMPDIR/w.pt"
  CONT=image NEXP=1 job --train-images images --train-annotations a.json --val-images images --val-annotations=a.json \
    --weights "$BATS_TEST_TMPDIR/w.pt"
  [ "$status" -eq 0 ]
  own=$project/images:/own/train-images:ro,$project/a.json:/own/train-annotations/a.json:ro
  own+=,$project/images:/own/val-images:ro,$project/a.json:/own/val-annotations/a.json:ro,$BATS_TEST_TMPDIR/w.pt:/own/weights/w.pt:ro
  grep --quiet --line-regexp -e "--container-mounts=$LOGDIR:/results:rw,$own" "$CALLS"
  [[ $(<"$RUNS") == *"--train-images /own/train-images "*"--weights /own/weights/w.pt" ]]
}

@test "a number of nodes or accelerators that differs from the config file is rejected, with both numbers" {
  SLURM_JOB_NUM_NODES=3 job
  [ "$status" -eq 2 ]
  [[ $output == *"config_pair.sh sets DGXNNODES=2"*"SLURM_JOB_NUM_NODES=3"*"sbatch -N 2"* ]]
  SLURM_JOB_NUM_NODES=2 SLURM_GPUS_ON_NODE=4 job
  [ "$status" -eq 2 ]
  [[ $output == *"DGXNGPU=8"*"SLURM_GPUS_ON_NODE=4"* ]]
  SLURM_GPUS_ON_NODE=8 NEXP=1 job
  [ "$status" -eq 0 ]
  [ "$(wc -l <"$RUNS")" -eq 1 ]
}

@test "variables of Slurm that are no numbers, and several tasks per node, are rejected by name" {
  for name in SLURM_JOB_NUM_NODES SLURM_GPUS_ON_NODE SLURM_NTASKS_PER_NODE; do
    for value in abc 08 "a[\$(touch "$BATS_TEST_TMPDIR/pwned")]"; do
      run env "$name=$value" SLURM_JOB_ID=42 "$project/run.sub"
      [[ $status -eq 2 && ${#lines[@]} -eq 1 && $output == "error: $name=$value: "* ]]
    done
  done
  run env SLURM_JOB_ID=4_2 "$project/run.sub"
  [[ $status -eq 2 && $output == "error: SLURM_JOB_ID=4_2: "* ]]
  SLURM_NTASKS_PER_NODE=8 job
  [[ $status -eq 2 && $output == "error: job 42 has SLURM_NTASKS_PER_NODE=8. Use sbatch --ntasks-per-node=1"* ]]
  printf 'export DGXNNODES=2 DGXNGPU=08\n' >"$project/config_pair.sh"
  job
  [[ $status -eq 2 && $output == "error: DGXNGPU=08: "* ]]
  [[ ! -e $BATS_TEST_TMPDIR/pwned && ! -s $RUNS ]]
}

@test "an unknown system, an invalid count, an invalid time and a wrong folder give one message each" {
  DGXSYSTEM=none run "$project/run.sub"
  [[ $status -eq 2 && $output == "error: DGXSYSTEM=none: config_none.sh does not exist. Available: config_pair.sh config_soon.sh config_toy.sh"* ]]
  NEXP=0 run "$project/run.sub"
  [[ $status -eq 2 && $output == "error: NEXP=0 is not a valid number"* ]]
  DGXSYSTEM=soon run "$project/run.sub"
  [[ $status -eq 2 && $output == *"WALLTIME=soon"* ]]
  rm "$project/run_and_time.sh"
  job
  [[ $status -eq 2 && $output == "error: run_and_time.sh is not in $project. Call sbatch in the folder of run.sub" ]]
  [ ! -s "$CALLS" ]
}

# write_log_end NUMBER STATUS [epoch_num]: writes the last line of a run's log.
write_log_end() {
  local run=$LOGDIR/pair/ssd/job_42/experiment_$1
  mkdir -p "$run"
  mllog_line run_stop "\"status\": \"$2\"${3:+, \"epoch_num\": $3}" >"$run/result_$1.txt"
}

@test "a requeued job skips finished experiments and resumes the interrupted one" {
  write_log_end 0 success 50
  write_log_end 1 aborted 80
  write_log_end 2 aborted
  echo "first part" >"$LOGDIR/job_42_3.log"
  NEXP=4 SLURM_RESTART_COUNT=1 job --seed 5
  [ "$status" -eq 3 ]
  [ "$(sed 's/ .*\]/:/' "$RUNS")" = "$(printf '%s\n' '2: --seed 5 --seed 7 --resume auto' '3: --seed 5 --seed 8')" ]
  [ "$(<"$LOGDIR/job_42_3.log")" = "$(printf 'first part\noutput of the run and the MLPerf log')" ]
}

@test "srun gets a signal that it forwards, and no other experiment starts" {
  for signal in TERM USR1; do
    rm -f "$BATS_TEST_TMPDIR/waits" "$RUNS"
    cd "$project"
    SLURM_JOB_ID=42 SLURM_JOB_NUM_NODES=2 WAIT=$BATS_TEST_TMPDIR/waits ./run.sub >"$BATS_TEST_TMPDIR/out" 2>&1 3>&- &
    job=$!
    until [[ -e $BATS_TEST_TMPDIR/waits ]]; do sleep 0.05; done
    kill -s "$signal" "$job"
    status=0
    wait "$job" || status=$?
    [ "$status" -eq 143 ]
    grep -q "SIG$signal: stopping the run" "$BATS_TEST_TMPDIR/out"
    grep -q 'srun got USR1' "$LOGDIR/job_42_1.log"
    [ "$(wc -l <"$RUNS")" -eq 1 ]
  done
  [ "$(grep --count scontrol "$CALLS")" -eq 0 ]
}

@test "no experiment starts after one that a signal stopped on the nodes" {
  STATUSES="143 0" NEXP=2 job
  [ "$status" -eq 143 ]
  [ "$(wc -l <"$RUNS")" -eq 1 ]
}

@test "REQUEUE=1 requeues the job after a signal, unless it was canceled" {
  for state in RUNNING COMPLETING; do
    rm -f "$BATS_TEST_TMPDIR/waits"
    : >"$CALLS"
    cd "$project"
    STATE=$state REQUEUE=1 SLURM_JOB_ID=42 SLURM_JOB_NUM_NODES=2 WAIT=$BATS_TEST_TMPDIR/waits ./run.sub >"$BATS_TEST_TMPDIR/out" 2>&1 3>&- &
    job=$!
    until [[ -e $BATS_TEST_TMPDIR/waits ]]; do sleep 0.05; done
    kill -s TERM "$job"
    wait "$job" || true
    [ "$(grep --after-context=3 scontrol "$CALLS" | xargs)" = "$([[ $state == COMPLETING ]] || echo scontrol requeue 42 --end--)" ]
  done
}

# node [NAME=value ...]: makes a dry run of run_and_time.sh, which prints the launch line of the ranks.
node() {
  mkdir -p "$project/venv/bin"
  printf '#!/bin/sh\n' | tee "$project/setup.sh" >"$project/venv/bin/python"
  chmod +x "$project/setup.sh" "$project/venv/bin/python"
  VENV=venv run env "$@" "$project/run_and_time.sh" --dry-run
}

@test "a node of a Slurm job connects to Slurm's address of node 0, at a port derived from the job" {
  node SLURM_JOB_ID=31234 SLURM_JOB_NODELIST='n[0-1]' SLURM_NODEID=1 SLURM_STEP_NUM_NODES=2
  [ "$status" -eq 0 ]
  [[ $output == *"--node-rank 1 --master-addr 10.0.0.7 --master-port 21234 -m ssd train" ]]
  printf '#!/bin/sh\nexit 1\n' >"$bin/scontrol" # no scontrol in a container
  node SLURM_JOB_ID=7 SLURM_JOB_NODELIST='n[0-1]' SLURM_NODEID=0 SLURM_LAUNCH_NODE_IPADDR=10.0.0.8
  [[ $output == *"--node-rank 0 --master-addr 10.0.0.8 --master-port 20007 -m ssd train" ]]
  node SLURM_JOB_ID=7 MASTER_ADDR=here MASTER_PORT=5 NODE_RANK=1
  [[ $output == *"--node-rank 1 --master-addr here --master-port 5 -m ssd train" ]]
}

@test "an extra node is rejected, with both numbers" {
  node MASTER_ADDR=here SLURM_STEP_NUM_NODES=3
  [[ $status -eq 2 && $output == "error: config_pair.sh sets DGXNNODES=2, but Slurm started this on SLURM_STEP_NUM_NODES=3" ]]
  node MASTER_ADDR=here NODE_RANK=2
  [[ $status -eq 2 && $output == "error: config_pair.sh sets DGXNNODES=2, but NODE_RANK=2. It counts from 0" ]]
}
