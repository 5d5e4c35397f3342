# shellcheck shell=bash disable=SC2154
# Sourced by setup.sh --vendor: system packages, SDK installers and wheels that a vendor of accelerators hands out.

marks=$root/.vendor # what is done, and the output of each installer
installers=() wheels=()

# check_vendor: tells every mistake before anything is installed.
check_vendor() {
  case $vendor in
    nvidia | cpu) ;; # the torch of the package index is theirs
    iluvatar | cambricon | amd)
      [[ -n $packages ]] || die "--vendor $vendor: the package index has no torch for it. Pass --packages DIR, the folder with its installers and wheels"
      ;;
    *) die "--vendor $vendor: there is none of that name. There are: iluvatar cambricon nvidia amd cpu" ;;
  esac
  if [[ -z $packages ]]; then return; fi
  [[ -d $packages ]] || die "--packages $packages is no folder"
  packages=$(realpath "$packages")
  mapfile -t installers < <(find "$packages" -maxdepth 1 -type f \( -name '*.run' -o -name '*.sh' \) | LC_ALL=C sort)
  mapfile -t wheels < <(find "$packages" -maxdepth 1 -type f -name '*.whl' | LC_ALL=C sort)
  case $vendor in
    nvidia | cpu) ;;
    *) [[ ${wheels[*]} == */torch-*.whl* ]] || die "--packages $packages holds no torch-*.whl, which --vendor $vendor needs" ;;
  esac
}

# install_vendor_software: what belongs to the machine and not to the environment, once.
install_vendor_software() {
  local file name words
  mkdir -p "$marks"
  file=$packages/apt-packages.txt
  if [[ -f $file ]]; then
    mapfile -t words < <(grep --invert-match '^ *#' "$file" | tr --squeeze-repeats ' \t' '\n' | grep .)
    once "$file" apt-get install --yes "${words[@]}"
  fi
  for file in "${installers[@]}"; do
    name=$(arguments_of "$file")
    read -r -a words <<<"${!name:-}"
    once "$file" bash "$file" "${words[@]}"
  done
}

# arguments_of FILE: the variable with the arguments of an installer, by the first word of its name:
# INSTALL_ARGS_COREX of corex-installer-4.1.run.
arguments_of() {
  [[ $(basename "$1") =~ ^[[:alnum:]]* ]] && tr '[:lower:]' '[:upper:]' <<<"INSTALL_ARGS_${BASH_REMATCH[0]}"
}

# once FILE COMMAND ...: runs what a file asks for; that is done until the file or its arguments change.
once() {
  local name state status log
  name=$(basename "$1")
  state="$(stat --format '%s %Y' "$1") ${*:2}"
  log=$marks/$name.log
  if [[ -f $marks/$name.done && $(<"$marks/$name.done") == "$state" ]]; then
    echo "setup.sh: $name is done already"
    return
  fi
  echo "setup.sh: $name: ${*:2}"
  "${@:2}" </dev/null &>"$log" && status=0 || status=$?
  if ((status)); then
    tail -n 20 "$log" >&2
    die "$name ended with status $status; all that it said is in $log. Mend that and call this again: what is done stays done" 1
  fi
  printf '%s\n' "$state" >"$marks/$name.done"
}

wheels_installed() {
  ((${#wheels[@]} == 0)) || [[ -f $venv/.wheels && $(<"$venv/.wheels") == "$(stat --format '%n %s %Y' "${wheels[@]}")" ]]
}

install_wheels() {
  if wheels_installed; then return; fi
  echo "setup.sh: installing $(basename --multiple "${wheels[@]}" | paste --serial --delimiters ' ')"
  if ! "$python" -m pip install --disable-pip-version-check --no-input "${wheels[@]}"; then
    die "pip could not install the wheels of $packages (its reason is above). They must be for $("$python" -V)" 1
  fi
  pin_torch
  stat --format '%n %s %Y' "${wheels[@]}" >"$venv/.wheels"
}
