#!/usr/bin/env bash
# Makes the environment where it is missing and runs all tests: those of the scripts (bats), then those of the
# program (pytest, which gets the arguments: ./tests/run.sh -m gpu, ./tests/run.sh -k anchors).
# ./tests/run.sh --container builds the container image and trains in it instead.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ ${1:-} == --container ]]; then exec tests/container.sh "${@:2}"; fi
./setup.sh --dev --quiet
venv=${VENV:-.venv}

# Sets `bats` to the command, or to nothing where it can neither be found nor installed.
find_bats() {
  local log
  bats=$(command -v bats || true)
  if [[ -z $bats && -x $venv/node_modules/bats/bin/bats ]]; then bats=$venv/node_modules/bats/bin/bats; fi
  if [[ -n $bats ]]; then return; fi
  echo "tests/run.sh: installing bats, which runs the tests of the scripts"
  log=$(mktemp)
  if [[ $EUID == 0 ]] && command -v apt-get >/dev/null &&
    { apt-get install --yes bats || { apt-get update && apt-get install --yes bats; }; } &>"$log"; then
    bats=$(command -v bats)
  elif command -v npm >/dev/null && npm install --silent --no-save --prefix "$venv" bats &>"$log"; then
    bats=$venv/node_modules/bats/bin/bats
  else
    echo "tests/run.sh: no bats, and it could not be installed: the tests of the scripts are SKIPPED"
  fi
  rm "$log"
}

status=0 scripts=''
find_bats
if [[ -n $bats ]]; then # beside the others, since they wait most of the time; shown after them
  output=$(mktemp)
  "$bats" tests/scripts &>"$output" &
  scripts=$!
  trap 'kill "$scripts" 2>/dev/null || true; rm -f "$output"' EXIT
fi
# A process a core with one thread each: OpenMP's threads, waiting for each other's, would take the cores from them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
"$venv/bin/python" -m pytest --numprocesses auto --dist worksteal "$@" || status=1
if [[ -n $scripts ]]; then
  wait "$scripts" || status=1
  cat "$output"
fi
exit "$status"
