# shellcheck shell=bash disable=SC2154
# Vendor software, sourced by setup.sh --vendor: system packages, SDK installers and wheels of an accelerator vendor.

stamp_dir=$root/.vendor # stamps of finished installers, and their output
installers=() wheels=()

# check_vendor: reports every mistake before anything is installed.
check_vendor() {
  case $vendor in
    nvidia | cpu) ;; # the package index has torch for these
    iluvatar | cambricon | amd)
      [[ -n $packages ]] || die "--vendor $vendor: the package index has no torch for it. Pass --packages DIR, the folder with its installers and wheels"
      ;;
    *) die "--vendor $vendor: unknown vendor. Use one of: iluvatar cambricon nvidia amd cpu" ;;
  esac
  if [[ -z $packages ]]; then return; fi
  [[ -d $packages ]] || die "--packages $packages is not a folder"
  packages=$(realpath "$packages")
  mapfile -t installers < <(find "$packages" -maxdepth 1 -type f \( -name '*.run' -o -name '*.sh' \) | LC_ALL=C sort)
  mapfile -t wheels < <(find "$packages" -maxdepth 1 -type f -name '*.whl' | LC_ALL=C sort)
  case $vendor in
    nvidia | cpu) ;;
    *) [[ ${wheels[*]} == */torch-*.whl* ]] || die "--packages $packages contains no torch-*.whl, which --vendor $vendor needs" ;;
  esac
}

# install_vendor_software: installs what belongs to the machine rather than the environment, once.
install_vendor_software() {
  local file name words
  mkdir -p "$stamp_dir"
  file=$packages/apt-packages.txt
  if [[ -f $file ]]; then
    mapfile -t words < <(grep --invert-match '^ *#' "$file" | tr --squeeze-repeats ' \t' '\n' | grep .)
    run_once "$file" apt-get install --yes "${words[@]}"
  fi
  for file in "${installers[@]}"; do
    name=$(installer_args_var "$file")
    read -r -a words <<<"${!name:-}"
    run_once "$file" bash "$file" "${words[@]}"
  done
}

# installer_args_var FILE: prints the name of the variable with an installer's arguments, from the first word of its
# file name: INSTALL_ARGS_COREX for corex-installer-4.1.run.
installer_args_var() {
  [[ $(basename "$1") =~ ^[[:alnum:]]* ]] && tr '[:lower:]' '[:upper:]' <<<"INSTALL_ARGS_${BASH_REMATCH[0]}"
}

# run_once FILE COMMAND ...: runs the command unless it has succeeded before with the same file and arguments.
run_once() {
  local name state status log
  name=$(basename "$1")
  state="$(stat --format '%s %Y' "$1") ${*:2}"
  log=$stamp_dir/$name.log
  if [[ -f $stamp_dir/$name.done && $(<"$stamp_dir/$name.done") == "$state" ]]; then
    echo "setup.sh: $name is already done"
    return
  fi
  echo "setup.sh: $name: ${*:2}"
  "${@:2}" </dev/null &>"$log" && status=0 || status=$?
  if ((status)); then
    tail -n 20 "$log" >&2
    die "$name failed with status $status. Its output is in $log. Fix the cause and run this again: finished steps are skipped" 1
  fi
  printf '%s\n' "$state" >"$stamp_dir/$name.done"
}

wheels_installed() {
  ((${#wheels[@]} == 0)) || [[ -f $venv/.wheels && $(<"$venv/.wheels") == "$(stat --format '%n %s %Y' "${wheels[@]}")" ]]
}

install_wheels() {
  if wheels_installed; then return; fi
  echo "setup.sh: installing $(basename --multiple "${wheels[@]}" | paste --serial --delimiters ' ')"
  (pip_install "${wheels[@]}") || die "the wheels in $packages must be built for $("$python" -V)" 1
  pin_torch
  stat --format '%n %s %Y' "${wheels[@]}" >"$venv/.wheels"
}
