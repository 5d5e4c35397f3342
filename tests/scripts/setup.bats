#!/usr/bin/env bats
# setup.sh with a stub Python: it makes folders and writes down what pip was asked for, nothing is installed.

load scripts

setup() {
  project="$BATS_TEST_TMPDIR/the project"
  bin=$BATS_TEST_TMPDIR/bin
  mkdir "$project" "$bin"
  cp "$repository/setup.sh" "$repository/vendor.sh" "$repository/pyproject.toml" "$project/"
  export PIP_LOG=$BATS_TEST_TMPDIR/pip.log
  : >"$PIP_LOG"
  export VERSION=3.12.1 MODULES='venv ensurepip'
  stub python3.12
  for name in python3.13 python3.11 python3; do broken_shim "$name"; done
  PATH=$bin:$PATH
  unset VENV PYTHON
}

# stub NAME: a Python of version $VERSION that has the modules $MODULES.
stub() {
  cat >"$bin/$1" <<'END'
#!/usr/bin/env bash
case "$*" in
  -V) echo "Python $VERSION" ;;
  *'(3, 11) <= sys.version_info'*) [[ $VERSION =~ ^3\.1[123]\. ]] ;;
  *'print("python%d.%d"'*) echo "python${VERSION%.*}" ;;
  '-c import '*)
    names=${2#import }
    for name in ${names//,/}; do [[ " $MODULES " == *" $name "* ]] || exit 1; done
    ;;
  '-m venv '*)
    folder=${*: -1}
    mkdir -p "$folder/bin"
    rm -f "$folder/.installed" "$folder/.installing"
    shared=false
    if [[ $* == *--system-site-packages* ]]; then shared=true; fi
    echo "include-system-site-packages = $shared" >"$folder/pyvenv.cfg"
    cp "$0" "$folder/bin/python"
    echo "venv $*" >>"$PIP_LOG"
    ;;
  '-m pip --version') ;;
  '-m pip install '*)
    echo "pip $*" >>"$PIP_LOG"
    if [[ -n ${PIP_KILLS:-} ]]; then kill -KILL "$PPID"; fi
    if [[ -n ${PIP_WAITS:-} ]]; then sleep 1; fi
    exit "${PIP_STATUS:-0}"
    ;;
  -) echo "torch==2.12.0a0+image" ;;
esac
END
  chmod +x "$bin/$1"
}

# A version manager's shim: it is on PATH, and it does not run.
broken_shim() {
  printf '#!/bin/sh\nexit 127\n' >"$bin/$1"
  chmod +x "$bin/$1"
}

installations() {
  grep --count '^pip ' "$PIP_LOG" || true
}

environments() {
  grep --count '^venv ' "$PIP_LOG" || true
}

@test "the environment is made with the Python that runs, and the project installed into it" {
  run "$project/setup.sh"
  [ "$status" -eq 0 ]
  [[ $output == *"making $project/.venv with Python 3.12.1"* ]]
  [[ $(<"$PIP_LOG") == *"--editable ." ]]
  [[ ${lines[-1]} == *"is ready" ]]
}

@test "a second call does nothing, says so in one line, and with --quiet in none" {
  "$project/setup.sh"
  run "$project/setup.sh"
  [ "$status" -eq 0 ]
  [ "$output" = "setup.sh: $project/.venv is up to date" ]
  run "$project/setup.sh" --quiet
  [ -z "$output" ]
  [ "$(installations)" -eq 1 ]
}

@test "--dev adds to an environment without it, and one with it also serves without" {
  "$project/setup.sh"
  "$project/setup.sh" --dev
  [[ $(tail -n 1 "$PIP_LOG") == *"--editable .[dev]" ]]
  "$project/setup.sh"
  "$project/setup.sh" --dev
  [ "$(installations)" -eq 2 ]
  [ "$(environments)" -eq 1 ]
}

@test "a changed pyproject.toml is installed again, with the extras that were there" {
  "$project/setup.sh" --dev
  echo '# changed' >>"$project/pyproject.toml"
  "$project/setup.sh"
  [ "$(installations)" -eq 2 ]
  [[ $(tail -n 1 "$PIP_LOG") == *"--editable .[dev]" ]]
}

@test "a project that moved is installed again" {
  "$project/setup.sh"
  mv "$project" "$project elsewhere"
  "$project elsewhere/setup.sh"
  [ "$(installations)" -eq 2 ]
}

@test "an installation that was killed is not taken for done, and begins from an empty environment" {
  PIP_KILLS=1 run "$project/setup.sh"
  [ "$status" -ne 0 ]
  run "$project/setup.sh"
  [ "$status" -eq 0 ]
  [ "$(installations)" -eq 2 ]
  [ "$(environments)" -eq 2 ]
}

@test "an installation that pip refused keeps the environment and is tried again" {
  PIP_STATUS=1 run "$project/setup.sh"
  [ "$status" -eq 1 ]
  [[ ${lines[-1]} == "error: pip could not install the packages"* ]]
  run "$project/setup.sh"
  [ "$status" -eq 0 ]
  [ "$(installations)" -eq 2 ]
  [ "$(environments)" -eq 1 ]
}

@test "an environment whose Python is gone is made again" {
  "$project/setup.sh"
  rm "$project/.venv/bin/python"
  run "$project/setup.sh"
  [ "$status" -eq 0 ]
  [ "$(environments)" -eq 2 ]
}

@test "two at once: the second waits and installs nothing" {
  PIP_WAITS=1 "$project/setup.sh" 3>&- &
  until [[ -s $PIP_LOG ]]; do sleep 0.05; done
  run "$project/setup.sh"
  wait $!
  [ "$status" -eq 0 ]
  [[ ${lines[0]} == *"another setup.sh is at work"* ]]
  [ "$(installations)" -eq 1 ]
}

@test "no Python that fits is one message with what to do" {
  broken_shim python3.12
  run "$project/setup.sh"
  [ "$status" -eq 2 ]
  [[ $output == "error: no Python 3.11 to 3.13 on PATH. Install one"* ]]
  [ ! -s "$PIP_LOG" ]
}

@test "a Python without the venv module names the package to install" {
  MODULES=venv run "$project/setup.sh"
  [ "$status" -eq 2 ]
  [[ $output == "error: python3.12 lacks the venv and ensurepip modules."*"apt-get install python3.12-venv" ]]
}

@test "PYTHON names the interpreter, and one that does not fit is refused" {
  stub other-python
  VERSION=3.9.2 PYTHON=$bin/other-python run "$project/setup.sh"
  [ "$status" -eq 2 ]
  [[ $output == "error: PYTHON=$bin/other-python does not run or is not Python 3.11 to 3.13" ]]
  broken_shim python3.12
  PYTHON=$bin/other-python run "$project/setup.sh"
  [ "$status" -eq 0 ]
}

@test "VENV names the folder, and one with other files is refused" {
  VENV="$BATS_TEST_TMPDIR/my environment" run "$project/setup.sh"
  [ "$status" -eq 0 ]
  [ -f "$BATS_TEST_TMPDIR/my environment/.installed" ]
  VENV=$project run "$project/setup.sh"
  [ "$status" -eq 2 ]
  [[ $output == "error: VENV=$project holds other files"* ]]
}

@test "--system-site-packages pins the torch of the image and needs no ensurepip" {
  MODULES='venv pip' run "$project/setup.sh" --system-site-packages
  [ "$status" -eq 0 ]
  [[ $(<"$PIP_LOG") == *"-m venv --clear --system-site-packages --without-pip "*"--constraint $project/.venv/constraints.txt"* ]]
  [ "$(<"$project/.venv/constraints.txt")" = "torch==2.12.0a0+image" ]
  run "$project/setup.sh" --quiet
  [ -z "$output" ]
}

# vendor_folder: sets dir to what a vendor hands out: two installers and two wheels.
vendor_folder() {
  dir="$BATS_TEST_TMPDIR/handed out"
  mkdir "$dir"
  for name in 1toolkit-4.1.run driver_4.1.run; do
    # shellcheck disable=SC2016 # for the installer to expand
    echo 'echo "$(basename "$0"): $#: $*" >>"$PIP_LOG"; echo "hello from $0"; exit "${INSTALLER_STATUS:-0}"' >"$dir/$name"
  done
  touch "$dir/torch-2.4.0+corex-cp312-none-any.whl" "$dir/apex-0.1-py3-none-any.whl"
}

@test "--vendor runs the installers in order with their arguments, then installs the wheels and pins torch" {
  vendor_folder
  INSTALL_ARGS_DRIVER='--silent --path /opt/x' run "$project/setup.sh" --vendor iluvatar --packages "$dir"
  [ "$status" -eq 0 ]
  mapfile -t calls <"$PIP_LOG"
  [ "${calls[0]}" = "1toolkit-4.1.run: 0: " ]
  [ "${calls[1]}" = "driver_4.1.run: 3: --silent --path /opt/x" ]
  [[ ${calls[3]} == "pip -m pip install "*"/apex-0.1-py3-none-any.whl "*"/torch-2.4.0+corex-cp312-none-any.whl" ]]
  [[ ${calls[4]} == *"--constraint $project/.venv/constraints.txt --editable ." ]]
  [ "$(<"$project/.venv/constraints.txt")" = "torch==2.12.0a0+image" ]
}

@test "--vendor a second time does nothing, and what changed again" {
  vendor_folder
  "$project/setup.sh" --vendor cambricon --packages "$dir"
  : >"$PIP_LOG"
  run "$project/setup.sh" --vendor cambricon --packages "$dir"
  [ "$status" -eq 0 ]
  [ ! -s "$PIP_LOG" ]
  [[ $output == *"1toolkit-4.1.run is done already"*"is up to date" ]]
  "$project/setup.sh" --quiet
  [ ! -s "$PIP_LOG" ]
  touch -d tomorrow "$dir"/driver_4.1.run "$dir"/torch-*.whl
  "$project/setup.sh" --vendor cambricon --packages "$dir"
  [[ $(<"$PIP_LOG") == "driver_4.1.run: 0: "*"torch-2.4.0"* ]]
  [[ $(<"$PIP_LOG") != *1toolkit* ]]
}

@test "--vendor stops at the installer that fails, with its log, and goes on there" {
  vendor_folder
  INSTALLER_STATUS=5 run "$project/setup.sh" --vendor iluvatar --packages "$dir"
  [ "$status" -eq 1 ]
  [[ $output == *"hello from $dir/1toolkit-4.1.run"* ]]
  [[ ${lines[-1]} == "error: 1toolkit-4.1.run ended with status 5; all that it said is in $project/.vendor/1toolkit-4.1.run.log."* ]]
  [[ $(<"$PIP_LOG") != *driver* ]]
  [ "$(environments)" -eq 0 ]
  run "$project/setup.sh" --vendor iluvatar --packages "$dir"
  [ "$status" -eq 0 ]
  [[ $(<"$PIP_LOG") == *driver* ]]
}

@test "--vendor tells a mistake before anything is installed" {
  vendor_folder
  rm "$dir"/torch-*
  for mistake in \
    "--vendor acme|--vendor acme: there is none of that name. There are: iluvatar cambricon nvidia amd cpu" \
    "--vendor amd|--vendor amd: the package index has no torch for it. Pass --packages DIR" \
    "--vendor amd --packages nowhere|/nowhere is no folder" \
    "--packages nowhere|pass --vendor NAME, too" \
    "--vendor|--vendor needs a value"; do
    # shellcheck disable=SC2086 # two words
    run "$project/setup.sh" ${mistake%%|*}
    [ "$status" -eq 2 ]
    [[ $output == "error: "*"${mistake#*|}"* ]]
  done
  run "$project/setup.sh" --vendor iluvatar --packages "$dir"
  [ "$status" -eq 2 ]
  [[ $output == "error: --packages $dir holds no torch-*.whl, which --vendor iluvatar needs" ]]
  [ ! -s "$PIP_LOG" ]
}

@test "--vendor nvidia and cpu take torch from the package index" {
  run "$project/setup.sh" --vendor nvidia
  [ "$status" -eq 0 ]
  [[ $(<"$PIP_LOG") != *constraint* ]]
}

@test "an unknown flag is refused" {
  run "$project/setup.sh" --fast
  [ "$status" -eq 2 ]
  [[ $output == "error: setup.sh knows no argument '--fast'; ./setup.sh --help lists them" ]]
}

@test "--check says what is missing on a bare machine and changes nothing" {
  run "$project/setup.sh" --check
  [ "$status" -eq 1 ]
  [[ ${lines[0]} == "python "*"missing"*"./setup.sh makes it" ]]
  [ ! -e "$project/.venv" ]
}

@test "--check on a made environment lists torch and what else is there" {
  [ -f "${VENV:-$repository/.venv}/.installed" ] || skip "needs the environment of ./setup.sh"
  run "$repository/setup.sh" --check
  [ "$status" -eq 0 ]
  [[ $output == *"torch            ok        2."* ]]
  for row in python torchvision pycocotools mlperf-logging accelerator apex 'toy data' COCO backbone disk; do
    grep --quiet "^$row " <<<"$output"
  done
}
