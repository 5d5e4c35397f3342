#!/usr/bin/env bash
# Create the environment if needed and run all tests: those of the scripts (bats), then those of the program (pytest).
# pytest gets the arguments: ./tests/run.sh -m gpu, ./tests/run.sh -k anchors.
# ./tests/run.sh --container builds the container image and trains in it instead.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ ${1:-} == --container ]]; then exec tests/container.sh "${@:2}"; fi
./setup.sh --dev --quiet
venv=${VENV:-.venv}

# find_bats: sets `bats` to the command, or to nothing if it can neither be found nor installed.
find_bats() {
  local log
  bats=$(command -v bats || true)
  if [[ -z $bats && -x $venv/node_modules/bats/bin/bats ]]; then bats=$venv/node_modules/bats/bin/bats; fi
  if [[ -n $bats ]]; then return; fi
  echo "tests/run.sh: installing bats for the tests of the scripts"
  log=$(mktemp)
  if [[ $EUID == 0 ]] && command -v apt-get >/dev/null &&
    { apt-get install --yes bats || { apt-get update && apt-get install --yes bats; }; } &>"$log"; then
    bats=$(command -v bats)
  elif command -v npm >/dev/null && npm install --silent --no-save --prefix "$venv" bats &>"$log"; then
    bats=$venv/node_modules/bats/bin/bats
  else
    echo "tests/run.sh: bats could not be installed: the tests of the scripts are SKIPPED"
  fi
  rm "$log"
}

status=0 scripts=''
find_bats
if [[ -n $bats ]]; then # in parallel with pytest, since they mostly wait; their output is printed last
  output=$(mktemp)
  "$bats" tests/scripts &>"$output" &
  scripts=$!
  trap 'kill "$scripts" 2>/dev/null || true; rm -f "$output"' EXIT
fi
# One process per core with one thread each: busy-waiting OpenMP threads would compete for the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
"$venv/bin/python" -m pytest --numprocesses auto --dist worksteal "$@" || status=1
if [[ -n $scripts ]]; then
  wait "$scripts" || status=1
  cat "$output"
fi
exit "$status"
