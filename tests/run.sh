#!/usr/bin/env bash
# Create the environment if needed and run tests: those of the scripts (bats), and those of the program (pytest).
set -euo pipefail

usage() {
  cat <<'END'
usage: ./tests/run.sh [arguments of pytest]
       ./tests/run.sh --all
       ./tests/run.sh --container [flags of run_and_time.sh]

Without arguments, runs the default suite. Arguments go to pytest: ./tests/run.sh -m gpu, ./tests/run.sh tests/ssd -k loss.

  --all        run every group of tests that this machine allows, and print a table of them. Exits with 1 if one failed
  --container  build the container image and train in it
END
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in
  -h | --help) usage && exit ;;
  --container) exec tests/container.sh "${@:2}" ;;
esac
./setup.sh --dev --quiet
venv=${VENV:-.venv}
folder=$(mktemp -d)
scripts=''
trap '[[ -z $scripts ]] || kill "$scripts" 2>/dev/null || true; rm -rf "$folder"' EXIT

# find_bats: sets `bats` to the command, or to nothing if it can neither be found nor installed.
find_bats() {
  bats=$(command -v bats || true)
  if [[ -z $bats && -x $venv/node_modules/bats/bin/bats ]]; then bats=$venv/node_modules/bats/bin/bats; fi
  if [[ -n $bats ]]; then return; fi
  echo "tests/run.sh: installing bats for the tests of the scripts"
  if [[ $EUID == 0 ]] && command -v apt-get >/dev/null &&
    { apt-get install --yes bats || { apt-get update && apt-get install --yes bats; }; } &>"$folder/install"; then
    bats=$(command -v bats)
  elif command -v npm >/dev/null && npm install --silent --no-save --prefix "$venv" bats &>"$folder/install"; then
    bats=$venv/node_modules/bats/bin/bats
  else
    echo "tests/run.sh: bats could not be installed: the tests of the scripts are SKIPPED"
  fi
}

rows=() status=0

# add_row GROUP PASSED FAILED SKIPPED [REASON]
add_row() {
  rows+=("$(printf '%-10s %6s %6s %7s  %s' "$1" "$2" "$3" "$4" "${5:-}")")
  if [[ $3 != [0-] ]]; then status=1; fi
}

# run_pytest GROUP ARGUMENT ...: runs one group and adds its row. If all its tests were skipped, the row says why.
run_pytest() {
  local counts code=0
  echo "=== $1"
  "$venv/bin/python" -m pytest --junitxml "$folder/$1.xml" "${@:2}" || code=$?
  counts=$(
    "$venv/bin/python" - "$folder/$1.xml" "$code" <<'END'
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

path, code = Path(sys.argv[1]), int(sys.argv[2])
cases = ElementTree.parse(path).findall(".//testcase") if path.exists() else []
skips = [skip.get("message") for case in cases for skip in case.findall("skipped")]
failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
passed = len(cases) - failed - len(skips)
if code not in (0, 5):  # pytest itself may have failed
    failed = max(1, failed)
if passed or failed:
    print(passed, failed, len(skips))
else:
    print("-", "-", len(skips), "not possible:", skips[0] if skips else "no such tests")
END
  )
  read -r -a counts_words <<<"$counts"
  add_row "$1" "${counts_words[@]:0:3}" "${counts_words[*]:3}"
}

run_container() {
  local code=0
  echo "=== container"
  tests/container.sh |& tee "$folder/container" || code=${PIPESTATUS[0]}
  case $code in
    0) add_row container 1 0 0 ;;
    2) add_row container - - 1 "not possible: $(tail -n 1 "$folder/container")" ;;
    *) add_row container 0 1 0 ;;
  esac
}

find_bats
if [[ -n $bats ]]; then # in parallel with pytest, since they mostly wait; their output is printed last
  "$bats" tests/scripts &>"$folder/scripts" &
  scripts=$!
fi
# One process per core with one thread each: busy-waiting OpenMP threads would compete for the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
parallel=(--numprocesses auto --dist worksteal)
if [[ ${1:-} == --all ]]; then
  run_pytest default "${parallel[@]}" -m 'not slow and not gpu and not hosts and not slurm and not data'
  run_pytest slow "${parallel[@]}" -m 'slow and not gpu and not hosts and not slurm'
  for group in gpu hosts slurm; do run_pytest "$group" -m "$group"; done
  run_pytest data "${parallel[@]}" -m 'data and not slow and not gpu'
  run_container
else
  "$venv/bin/python" -m pytest "${parallel[@]}" "$@" || status=1
fi
if [[ -n $scripts ]]; then
  wait "$scripts" || status=1
  scripts=''
  cat "$folder/scripts"
fi
if [[ ${1:-} == --all ]]; then
  if [[ -n $bats ]]; then
    skipped=$(grep --count '^ok .* # skip' "$folder/scripts" || true)
    passed=$(grep --count '^ok ' "$folder/scripts" || true)
    add_row scripts $((passed - skipped)) "$(grep --count '^not ok ' "$folder/scripts" || true)" "$skipped"
  else
    add_row scripts - - - 'not possible: bats could not be installed'
  fi
  printf '\n%-10s %6s %6s %7s\n' group passed failed skipped
  printf '%s\n' "${rows[@]}"
fi
exit "$status"
