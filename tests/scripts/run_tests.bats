#!/usr/bin/env bats
# tests/run.sh with stubs for setup.sh, pytest, bats and tests/container.sh.

load scripts

setup() {
  project=$BATS_TEST_TMPDIR/project
  bin=$BATS_TEST_TMPDIR/bin
  mkdir -p "$project/tests" "$project/.venv/bin" "$bin"
  cp "$repository/tests/run.sh" "$project/tests"
  export CALLS=$BATS_TEST_TMPDIR/calls
  : >"$CALLS"
  # Of each group, one test passes. hosts skips its only one, one of slow fails, and pytest ends with 3 for data.
  cat >"$project/.venv/bin/python" <<'END'
#!/usr/bin/env bash
if [[ $1 == - ]]; then exec python3 "$@"; fi
echo "pytest ${*:3}" >>"$CALLS"
case $4 in
  */hosts.xml) cases='<testcase><skipped message="needs root"/></testcase>' ;;
  */slow.xml) cases='<testcase/><testcase><failure/></testcase>' ;;
  */data.xml) exit 3 ;;
  */gpu.xml) cases='' code=5 ;;
  *) cases='<testcase/>' ;;
esac
[[ $3 != --junitxml ]] || echo "<testsuites><testsuite>$cases</testsuite></testsuites>" >"$4"
exit "${code:-0}"
END
  # shellcheck disable=SC2016 # expanded by the stub
  printf '#!/bin/sh\necho "setup $*" >>"$CALLS"\n' >"$project/setup.sh"
  printf '#!/bin/sh\necho error: must run as root\nexit 2\n' >"$project/tests/container.sh"
  printf '#!/bin/sh\necho ok 1 one\necho "ok 2 two # skip needs root"\n' >"$bin/bats"
  chmod +x "$project/.venv/bin/python" "$project/setup.sh" "$project/tests/container.sh" "$bin/bats"
  PATH=$bin:$PATH
  unset VENV
}

@test "--all runs every group and prints a table, with what this machine lacks" {
  run "$project/tests/run.sh" --all
  [ "$status" -eq 1 ]
  table=$(sed -n '/^group /,$p' <<<"$output" | tr -s ' ' | sed 's/ $//')
  [ "$table" = "group passed failed skipped
default 1 0 0
slow 1 1 0
gpu - - 0 not possible: no such tests
hosts - - 1 not possible: needs root
slurm 1 0 0
data 0 1 0
container - - 1 not possible: error: must run as root
scripts 1 0 1" ]
  [ "$(grep --count '^pytest' "$CALLS")" -eq 6 ]
}

@test "arguments go to pytest, and its failure is that of the script" {
  run "$project/tests/run.sh" tests/ssd -k loss
  [ "$status" -eq 0 ]
  [ "$(<"$CALLS")" = "$(printf 'setup --dev --quiet\npytest --numprocesses auto --dist worksteal tests/ssd -k loss')" ]
  printf '#!/bin/sh\nexit 1\n' >"$bin/bats"
  run "$project/tests/run.sh"
  [ "$status" -eq 1 ]
}

@test "--help installs nothing" {
  run "$project/tests/run.sh" --help
  [[ $status -eq 0 && $output == "usage: "*"--all"* ]]
  [ ! -s "$CALLS" ]
}
