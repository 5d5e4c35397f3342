#!/usr/bin/env bats
# setup.sh with a stub Python that creates folders and logs the calls of pip. Nothing is installed.

load scripts

setup() {
  environment=$(any_python)
  project="$BATS_TEST_TMPDIR/the project"
  bin=$BATS_TEST_TMPDIR/bin
  mkdir -p "$project/scripts" "$bin"
  cp -r "$repository/scripts/lib" "$project/scripts"
  cp "$repository/setup.sh" "$repository/pyproject.toml" "$repository/constraints.txt" "$project/"
  export PIP_LOG=$BATS_TEST_TMPDIR/pip.log
  : >"$PIP_LOG"
  export VERSION=3.12.1 MODULES='venv ensurepip'
  stub python3.12
  for name in python3.13 python3.11 python3; do broken_shim "$name"; done
  PATH=$bin:$PATH
  unset VENV PYTHON
}

# stub NAME: a Python of version $VERSION with the modules $MODULES.
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
  '- dev') echo "what tests need" ;;
esac
END
  chmod +x "$bin/$1"
}

# broken_shim NAME: a version manager's shim that is on PATH but does not run.
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

@test "setup creates the environment with the working Python and installs what the project needs" {
  run "$project/setup.sh"
  [ "$status" -eq 0 ]
  [[ $output == *"creating $project/.venv with Python 3.12.1"* ]]
  [[ $(<"$PIP_LOG") == *"--requirement $project/.venv/requirements.txt" ]]
  [[ ${lines[-1]} == *"is ready" ]]
}

@test "a second call does nothing and prints one line, or none with --quiet" {
  "$project/setup.sh"
  run "$project/setup.sh"
  [ "$status" -eq 0 ]
  [ "$output" = "setup.sh: $project/.venv is up to date" ]
  run "$project/setup.sh" --quiet
  [ -z "$output" ]
  [ "$(installations)" -eq 1 ]
}

@test "--dev extends an environment, which also works without --dev" {
  "$project/setup.sh"
  "$project/setup.sh" --dev
  [ "$(<"$project/.venv/requirements.txt")" = "what tests need" ]
  "$project/setup.sh"
  "$project/setup.sh" --dev
  [ "$(installations)" -eq 2 ]
  [ "$(environments)" -eq 1 ]
}

@test "a changed pyproject.toml is installed again, with the same extras" {
  "$project/setup.sh" --dev
  echo '# changed' >>"$project/pyproject.toml"
  "$project/setup.sh"
  [ "$(installations)" -eq 2 ]
  [ "$(<"$project/.venv/requirements.txt")" = "what tests need" ]
}

@test "the exact versions of constraints.txt are installed, recorded, and installed again after a change" {
  "$project/setup.sh"
  [[ $(tail -n 1 "$PIP_LOG") == *"--constraint constraints.txt --requirement "* ]]
  sum=$(sha256sum <"$project/constraints.txt")
  [ "$(<"$project/.venv/.packages")" = "constraints.txt sha256:${sum:0:12}" ]
  echo '# changed' >>"$project/constraints.txt"
  "$project/setup.sh"
  "$project/setup.sh"
  [ "$(installations)" -eq 2 ]
  sum=$(sha256sum <"$project/constraints.txt")
  [ "$(<"$project/.venv/.packages")" = "constraints.txt sha256:${sum:0:12}" ]
}

@test "--latest upgrades in each call, and later calls without it keep what it installed" {
  "$project/setup.sh"
  "$project/setup.sh" --latest
  [[ $(tail -n 1 "$PIP_LOG") == *"--upgrade --upgrade-strategy eager --requirement "* ]]
  [ "$(<"$project/.venv/.packages")" = latest ]
  echo '# changed' >>"$project/constraints.txt"
  "$project/setup.sh" --quiet
  [ "$(installations)" -eq 2 ]
  "$project/setup.sh" --latest
  [ "$(installations)" -eq 3 ]
  [ "$(environments)" -eq 1 ]
}

@test "a moved project, and a second one with the same VENV, use the environment as it is" {
  "$project/setup.sh"
  mv "$project" "$project elsewhere"
  run "$project elsewhere/setup.sh"
  [ "$output" = "setup.sh: $project elsewhere/.venv is up to date" ]
  cp -r "$project elsewhere" "$project"
  VENV="$project elsewhere/.venv" run "$project/setup.sh" --quiet
  [ -z "$output" ]
  sed -i '1s|, |[dev] in /where/it was, in 2025, |' "$project elsewhere/.venv/.installed" # by an earlier release
  VENV="$project elsewhere/.venv" run "$project/setup.sh" --quiet
  [ -z "$output" ]
  [ "$(installations)" -eq 1 ]
}

# own_venv: creates an environment of the user, with a file that must stay.
own_venv() {
  mine=$BATS_TEST_TMPDIR/mine
  mkdir -p "$mine/bin"
  cp "$bin/python3.12" "$mine/bin/python"
  echo 'include-system-site-packages = false' | tee "$mine/pyvenv.cfg" >"$mine/work"
}

@test "an environment that setup.sh did not create keeps its files and packages, and gets what is missing" {
  own_venv
  VENV=$mine run "$project/setup.sh"
  [ "$status" -eq 0 ]
  VENV=$mine run "$project/setup.sh" --quiet
  [ -z "$output" ]
  [[ $(<"$PIP_LOG") == *"--constraint $mine/constraints.txt --requirement $mine/requirements.txt" ]]
  [ "$(<"$mine/.packages")" = own ]
  [[ -e $mine/work && $(environments) -eq 0 && $(installations) -eq 1 ]]
}

@test "an environment that setup.sh did not create is never cleared, whatever is wrong with it" {
  own_venv
  # shellcheck disable=SC2016 # evaluated below
  for problem in 'rm "$mine/bin/python"' 'broken_shim python && cp "$bin/python" "$mine/bin"' 'VERSION=3.9.1' \
    'touch "$mine/.installing" "$mine/.installed"; VERSION=3.14.0'; do
    own_venv
    eval "$problem"
    VENV=$mine PATH=$bin:/usr/bin:/bin run "$project/setup.sh"
    VERSION=3.12.1
    [[ $status -eq 2 && $output == "error: VENV=$mine has no working Python 3.11 to 3.13. setup.sh clears only "* ]]
    [ -e "$mine/work" ]
  done
  own_venv
  VENV=$mine run "$project/setup.sh" --system-site-packages
  [[ $status -eq 2 && $output == "error: VENV=$mine was created without --system-site-packages."* ]]
  [ ! -s "$PIP_LOG" ]
}

@test "an environment without pip is used through uv, or left alone" {
  own_venv
  sed -i "s/^  '-m pip --version') ;;/  '-m pip '*) exit 1 ;;/" "$mine/bin/python"
  VENV=$mine PATH=$bin:/usr/bin:/bin run "$project/setup.sh"
  [[ $status -eq 2 && $output == "error: VENV=$mine has no pip, and uv is not on PATH. Install one of them."* ]]
  # shellcheck disable=SC2016 # expanded by the stub
  printf '#!/bin/sh\necho "uv $*" >>"$PIP_LOG"\n' >"$bin/uv"
  chmod +x "$bin/uv"
  VENV=$mine run "$project/setup.sh"
  [ "$status" -eq 0 ]
  [ "$(<"$PIP_LOG")" = "uv pip install --python $mine/bin/python --constraint $mine/constraints.txt --requirement $mine/requirements.txt" ]
  [ -e "$mine/work" ]
}

@test "--torch-index takes torch and torchvision from there, now and in later calls" {
  run "$project/setup.sh" --torch-index https://wheels/cpu
  [ "$status" -eq 0 ]
  mapfile -t calls < <(grep '^pip ' "$PIP_LOG")
  [[ ${calls[0]} == *" --no-deps --index-url https://wheels/cpu --constraint constraints.txt --force-reinstall torch torchvision" ]]
  [[ ${calls[1]} == *" --constraint constraints.txt --constraint $project/.venv/constraints.txt --requirement "* ]]
  [ "$(<"$project/.venv/constraints.txt")" = "torch==2.12.0a0+image" ]
  run "$project/setup.sh" --quiet
  [ -z "$output" ]
  echo '# changed' >>"$project/constraints.txt"
  "$project/setup.sh"
  mapfile -t calls < <(grep '^pip ' "$PIP_LOG")
  [[ ${calls[2]} == *" --index-url https://wheels/cpu "*" torch torchvision" && ${calls[2]} != *--force-reinstall* ]]
  "$project/setup.sh" --torch-index https://wheels/other
  [[ $(grep '^pip ' "$PIP_LOG" | tail -n 2) == *" --index-url https://wheels/other "*" --force-reinstall torch torchvision"* ]]
  [ "$(environments)" -eq 1 ]
  run "$project/setup.sh" --torch-index https://wheels/cpu --system-site-packages
  [[ $status -eq 2 && $output == "error: --torch-index https://wheels/cpu: "* ]]
}

@test "the requirements are those of pyproject.toml, with the extras that another one names" {
  "$environment" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || skip "needs tomllib"
  mine=$BATS_TEST_TMPDIR/real
  "$environment" -m venv --without-pip "$mine"
  printf '#!/bin/sh\nexit\n' >"$bin/uv"
  chmod +x "$bin/uv"
  VENV=$mine run "$project/setup.sh" --dev
  [ "$status" -eq 0 ]
  [ "$(grep --count '^torch>=' "$mine/requirements.txt")" -eq 1 ]
  [ "$(grep --count '^onnxruntime>=' "$mine/requirements.txt")" -eq 1 ]
  [ "$(grep --count '^pytest>=' "$mine/requirements.txt")" -eq 1 ]
  [ "$(grep --count 'detection-training' "$mine/requirements.txt")" -eq 0 ]
  grep --quiet '^torch==' "$mine/constraints.txt" # not installed: the tested version
}

@test "a killed installation is repeated in an empty environment" {
  PIP_KILLS=1 run "$project/setup.sh"
  [ "$status" -ne 0 ]
  run "$project/setup.sh"
  [ "$status" -eq 0 ]
  [ "$(installations)" -eq 2 ]
  [ "$(environments)" -eq 2 ]
}

@test "a failed pip installation keeps the environment and is repeated" {
  PIP_STATUS=1 run "$project/setup.sh"
  [ "$status" -eq 1 ]
  [[ ${lines[-1]} == "error: pip could not install the packages"* ]]
  run "$project/setup.sh"
  [ "$status" -eq 0 ]
  [ "$(installations)" -eq 2 ]
  [ "$(environments)" -eq 1 ]
}

@test "an environment without its Python is created again" {
  "$project/setup.sh"
  rm "$project/.venv/bin/python"
  run "$project/setup.sh"
  [ "$status" -eq 0 ]
  [ "$(environments)" -eq 2 ]
}

@test "of two concurrent calls, the second waits and installs nothing" {
  PIP_WAITS=1 "$project/setup.sh" 3>&- &
  until [[ -s $PIP_LOG ]]; do sleep 0.05; done
  run "$project/setup.sh"
  wait $!
  [ "$status" -eq 0 ]
  [[ ${lines[0]} == *"waiting for another setup.sh"* ]]
  [ "$(installations)" -eq 1 ]
}

@test "a missing Python gives one message with a hint" {
  broken_shim python3.12
  run "$project/setup.sh"
  [ "$status" -eq 2 ]
  [[ $output == "error: no Python 3.11 to 3.13 on PATH. Install one"* ]]
  [ ! -s "$PIP_LOG" ]
}

@test "for a Python without the venv module, the message names the package to install" {
  MODULES=venv run "$project/setup.sh"
  [ "$status" -eq 2 ]
  [[ $output == "error: python3.12 lacks the venv and ensurepip modules."*"apt-get install python3.12-venv" ]]
}

@test "PYTHON names the interpreter, and an unsupported one is rejected" {
  stub other-python
  VERSION=3.9.2 PYTHON=$bin/other-python run "$project/setup.sh"
  [ "$status" -eq 2 ]
  [[ $output == "error: PYTHON=$bin/other-python does not run or is not Python 3.11 to 3.13."* ]]
  broken_shim python3.12
  PYTHON=$bin/other-python run "$project/setup.sh"
  [ "$status" -eq 0 ]
}

@test "VENV names the folder, and one with other files is rejected" {
  VENV="$BATS_TEST_TMPDIR/my environment" run "$project/setup.sh"
  [ "$status" -eq 0 ]
  [ -f "$BATS_TEST_TMPDIR/my environment/.installed" ]
  VENV=$project run "$project/setup.sh"
  [ "$status" -eq 2 ]
  [[ $output == "error: VENV=$project contains other files"* ]]
}

@test "--system-site-packages pins the torch of the image and needs no ensurepip" {
  MODULES='venv pip' run "$project/setup.sh" --system-site-packages
  [ "$status" -eq 0 ]
  [[ $(<"$PIP_LOG") == *"-m venv --system-site-packages --without-pip "*"--constraint $project/.venv/constraints.txt"* ]]
  [[ $(<"$PIP_LOG") != *"--constraint constraints.txt"* ]]
  [ "$(<"$project/.venv/.packages")" = system ]
  [ "$(<"$project/.venv/constraints.txt")" = "torch==2.12.0a0+image" ]
  run "$project/setup.sh" --quiet
  [ -z "$output" ]
}

# vendor_folder: sets `dir` to a vendor's folder with two installers and two wheels.
vendor_folder() {
  dir="$BATS_TEST_TMPDIR/vendor files"
  mkdir "$dir"
  for name in 1toolkit-4.1.run driver_4.1.run; do
    # shellcheck disable=SC2016 # expanded by the installer
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
  [[ ${calls[4]} == *"--constraint $project/.venv/constraints.txt --requirement "* ]]
  [ "$(<"$project/.venv/constraints.txt")" = "torch==2.12.0a0+image" ]
}

@test "a second --vendor call repeats only changed steps" {
  vendor_folder
  "$project/setup.sh" --vendor cambricon --packages "$dir"
  : >"$PIP_LOG"
  run "$project/setup.sh" --vendor cambricon --packages "$dir"
  [ "$status" -eq 0 ]
  [ ! -s "$PIP_LOG" ]
  [[ $output == *"1toolkit-4.1.run is already done"*"is up to date" ]]
  "$project/setup.sh" --quiet
  [ ! -s "$PIP_LOG" ]
  touch -d tomorrow "$dir"/driver_4.1.run "$dir"/torch-*.whl
  "$project/setup.sh" --vendor cambricon --packages "$dir"
  [[ $(<"$PIP_LOG") == "driver_4.1.run: 0: "*"torch-2.4.0"* ]]
  [[ $(<"$PIP_LOG") != *1toolkit* ]]
}

@test "--vendor stops at a failing installer, shows its log, and continues there" {
  vendor_folder
  INSTALLER_STATUS=5 run "$project/setup.sh" --vendor iluvatar --packages "$dir"
  [ "$status" -eq 1 ]
  [[ $output == *"hello from $dir/1toolkit-4.1.run"* ]]
  [[ ${lines[-1]} == "error: 1toolkit-4.1.run failed with status 5. Its output is in $project/.vendor/1toolkit-4.1.run.log."* ]]
  [[ $(<"$PIP_LOG") != *driver* ]]
  [ "$(environments)" -eq 0 ]
  run "$project/setup.sh" --vendor iluvatar --packages "$dir"
  [ "$status" -eq 0 ]
  [[ $(<"$PIP_LOG") == *driver* ]]
}

@test "--vendor reports mistakes before anything is installed" {
  vendor_folder
  rm "$dir"/torch-*
  for mistake in \
    "--vendor acme|--vendor acme: unknown vendor. Use one of: iluvatar cambricon nvidia amd cpu" \
    "--vendor amd|--vendor amd: the package index has no torch for it. Pass --packages DIR" \
    "--vendor amd --packages nowhere|/nowhere is not a folder" \
    "--packages nowhere|needs --vendor NAME" \
    "--vendor|--vendor needs a value"; do
    # shellcheck disable=SC2086 # two words
    run "$project/setup.sh" ${mistake%%|*}
    [ "$status" -eq 2 ]
    [[ $output == "error: "*"${mistake#*|}"* ]]
  done
  run "$project/setup.sh" --vendor iluvatar --packages "$dir"
  [ "$status" -eq 2 ]
  [[ $output == "error: --packages $dir contains no torch-*.whl, which --vendor iluvatar needs" ]]
  [ ! -s "$PIP_LOG" ]
}

@test "--vendor nvidia and cpu use the torch of the package index" {
  run "$project/setup.sh" --vendor nvidia
  [ "$status" -eq 0 ]
  [[ $(<"$PIP_LOG") != *constraint* ]]
  [ "$(<"$project/.venv/.packages")" = vendor ]
}

@test "an unknown flag is rejected" {
  run "$project/setup.sh" --fast
  [ "$status" -eq 2 ]
  [[ $output == "error: unknown argument '--fast'. See ./setup.sh --help" ]]
}

@test "--check lists missing items on a new machine and changes nothing" {
  run "$project/setup.sh" --check
  [ "$status" -eq 1 ]
  [[ ${lines[0]} == "python "*"missing"*"./setup.sh creates it" ]]
  [ ! -e "$project/.venv" ]
}

@test "--check lists every package that pyproject.toml requires or offers, and fails if one is missing" {
  "$environment" -c 'import tomllib, torch' || skip "needs the environment of ./setup.sh"
  mkdir -p "$project/.venv/bin"
  printf '#!/bin/sh\nexec "%s" "$@"\n' "$environment" >"$project/.venv/bin/python" # not installed for this project
  chmod +x "$project/.venv/bin/python"
  sed -i 's/^    "tqdm.*/    "no-such-package>=1",/' "$project/pyproject.toml"
  run "$project/setup.sh" --check
  [ "$status" -eq 1 ]
  [[ $output == *"torch            ok        2."*"no-such-package  missing   No module named 'no_such_package'"* ]]
  required=$(sed -n '/^dependencies/,/^]/s/^    "\([a-z0-9-]*\).*/\1/p' "$project/pyproject.toml")
  [ "$(wc -w <<<"$required")" -ge 15 ]
  for row in python versions $required '\[export\]' '\[tensorboard\]' '\[dev\]' accelerator apex 'toy data' COCO backbone disk; do
    grep --quiet "^$row  *\(ok\|none\|missing\) " <<<"$output" || { echo "no row $row in $output" && return 1; }
  done
}
