#!/usr/bin/env bash
# Makes the Python environment in .venv and installs this project into it. A second call costs nothing.
set -euo pipefail

usage() {
  cat <<'END'
usage: ./setup.sh [--dev] [--system-site-packages] [--quiet] [--check] [--vendor NAME [--packages DIR]]

  --dev                   also what the tests and linters need
  --system-site-packages  keep the torch that this machine or container image ships
  --quiet                 say nothing when there is nothing to do
  --check                 only say what is there and what is missing; exits 1 if something needed is missing
  --vendor NAME           prepare the machine for its accelerators: iluvatar, cambricon, nvidia, amd or cpu
  --packages DIR          what the vendor hands out: apt-packages.txt (names of system packages), installers (*.run,
                          *.sh, in the order of their names) and wheels (torch-*.whl, apex-*.whl, any), which are
                          installed instead of the package index's; what is done is skipped, a failure ends it

environment:
  INSTALL_ARGS_NAME  arguments of an installer, by the first word of its file's name: INSTALL_ARGS_COREX='--silent'
  VENV    folder of the environment (.venv)
  PYTHON  interpreter to make it from (the first of python3.13, 3.12, 3.11 and python3 that runs)
END
}

die() {
  printf 'error: %s\n' "$1" >&2
  exit "${2:-2}"
}

extras='' system=false quiet=false check=false vendor='' packages=''
while (($#)); do
  case $1 in
    --dev) extras='[dev]' ;;
    --system-site-packages) system=true ;;
    --quiet) quiet=true ;;
    --check) check=true ;;
    --vendor | --packages)
      (($# > 1)) || die "$1 needs a value; ./setup.sh --help says which"
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    -h | --help) usage && exit ;;
    *) die "setup.sh knows no argument '$1'; ./setup.sh --help lists them" ;;
  esac
  shift
done
[[ -z $packages || -n $vendor ]] || die "--packages $packages: pass --vendor NAME, too"
if [[ -n $packages ]]; then packages=$(realpath --canonicalize-missing "$packages"); fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$(realpath --canonicalize-missing "${VENV:-$root/.venv}")
python=$venv/bin/python
cd "$root"

# What the environment was made for, with the extras in $1: this text is the stamp of a finished installation.
stamp() {
  printf '%s\n' "detection-training$1 in $root, $("$python" -V 2>&1)" "$(<pyproject.toml)"
}

installed() {
  [[ -x $python && -f $venv/.installed && $(<"$venv/.installed") == "$(stamp "$1")" ]]
}

shares_system_packages() {
  grep --quiet --ignore-case '^include-system-site-packages = true' "$venv/pyvenv.cfg" 2>/dev/null
}

finished() {
  if [[ -e $venv/.installing ]]; then return 1; fi
  if [[ -n $vendor ]] && ! wheels_installed; then return 1; fi
  if $system && ! shares_system_packages; then return 1; fi
  if [[ -n ${PYTHON:-} && $("$PYTHON" -V 2>&1) != "$("$python" -V 2>&1)" ]]; then return 1; fi
  installed '[dev]' || { [[ -z $extras ]] && installed ''; }
}

supported() {
  "$1" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

can_make_environments() {
  "$1" -c 'import ensurepip, venv' 2>/dev/null || { $system && "$1" -c 'import pip, venv' 2>/dev/null; }
}

# Sets `base` to an interpreter that runs: a version manager's shim can be on PATH and still not run.
find_base() {
  local candidate bare=''
  if [[ -n ${PYTHON:-} ]]; then
    supported "$PYTHON" || die "PYTHON=$PYTHON does not run or is not Python 3.11 to 3.13"
  fi
  for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3; do
    supported "$candidate" || continue
    if can_make_environments "$candidate"; then
      base=$candidate
      return
    fi
    bare=${bare:-$candidate}
    if [[ -n ${PYTHON:-} ]]; then break; fi
  done
  if [[ -n $bare ]]; then
    bare=$("$bare" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    die "$bare lacks the venv and ensurepip modules. On Debian or Ubuntu: apt-get install $bare-venv"
  fi
  die "no Python 3.11 to 3.13 on PATH. Install one (Debian, Ubuntu: apt-get install python3 python3-venv), or name one: PYTHON=/path/to/python3.12 ./setup.sh"
}

# An environment that runs is kept and brought up to date, unless an installation into it was cut short.
usable() {
  [[ ! -e $venv/.installing && -x $python ]] && supported "$python" && "$python" -m pip --version &>/dev/null &&
    { ! $system || shares_system_packages; } &&
    { [[ -z ${PYTHON:-} ]] || [[ $("$PYTHON" -V 2>&1) == "$("$python" -V 2>&1)" ]]; }
}

make_environment() {
  local options=(--clear)
  find_base
  if $system; then
    options+=(--system-site-packages)
    if "$base" -c 'import pip' 2>/dev/null; then options+=(--without-pip); fi
  fi
  echo "setup.sh: making $venv with $("$base" -V 2>&1)"
  "$base" -m venv "${options[@]}" "$venv"
}

# pip must not replace the torch of the image or the vendor by another build: it is pinned to what is there.
pin_torch() {
  "$python" - >"$venv/constraints.txt" <<'END'
from importlib.metadata import PackageNotFoundError, version

for name in ("torch", "torchvision"):
    try:
        print(f"{name}=={version(name)}")
    except PackageNotFoundError:
        pass
END
}

install_packages() {
  local constraints=()
  if shares_system_packages; then pin_torch; fi
  if [[ -f $venv/constraints.txt ]]; then constraints=(--constraint "$venv/constraints.txt"); fi
  echo "setup.sh: installing detection-training$extras: torch and its libraries are several GB, this can take minutes"
  touch "$venv/.installing"
  if ! "$python" -m pip install --disable-pip-version-check --no-input "${constraints[@]}" --editable ".$extras"; then
    rm "$venv/.installing" # pip has rolled back what it had begun; only a kill leaves half a package behind
    die "pip could not install the packages (its reason is above). Mend that and run ./setup.sh again" 1
  fi
  stamp "$extras" >"$venv/.installed"
  rm "$venv/.installing"
}

row() { printf '%-16s %-9s %s\n' "$1" "$2" "$3"; }

# presence NAME FILE HINT: a row about a file that a run can do without.
presence() {
  if [[ -e $2 ]]; then row "$1" ok "$2"; else row "$1" none "$3"; fi
}

check_packages() {
  "$python" - <<'END'
import importlib
from importlib.metadata import PackageNotFoundError, version

missing = 0
modules = {"mlperf-logging": "mlperf_logging", "pillow": "PIL"}
for name in ("torch", "torchvision", "numpy", "pillow", "pycocotools", "mlperf-logging", "pydantic", "tqdm"):
    try:
        importlib.import_module(modules.get(name, name))
        print(f"{name:16} ok        {version(name)}")
    except (ImportError, OSError, PackageNotFoundError) as error:
        missing += 1
        print(f"{name:16} missing   {error}")
try:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count()
    found = f"{count} × {accelerator}" if accelerator else "torch sees none: runs use the CPU"
    print(f"{'accelerator':16} {'ok' if accelerator else 'none':9} {found}")
except (ImportError, AttributeError):
    pass
try:
    print(f"{'apex':16} ok        {version('apex')}")
except PackageNotFoundError:
    print(f"{'apex':16} none      optional: used only where it is asked for")
raise SystemExit(missing > 0)
END
}

check_machine() {
  local status=0 coco=${DATADIR:-data/coco} backbone=${PRETRAINED_DIR:-data}/resnet34-333f7ec4.pth command
  if [[ -x $python ]] && supported "$python"; then
    row python ok "$("$python" -V 2>&1), $python"
    check_packages || status=1
  else
    row python missing "no environment in $venv: ./setup.sh makes it"
    status=1
  fi
  if [[ $status == 0 ]] && ! finished; then
    row installation missing "$venv was not made by ./setup.sh from this pyproject.toml: run it"
    status=1
  fi
  for command in curl nvidia-smi docker podman; do
    presence "$command" "$(command -v "$command")" optional
  done
  presence 'toy data' data/toy/annotations './run_and_time.sh draws it'
  presence 'COCO-sized data' data/synthetic_coco/annotations 'DGXSYSTEM=synthetic_coco ./run_and_time.sh draws it, 20G'
  presence COCO "$coco/train2017" "not in $coco: ./init_datasets.sh fetches it (DATADIR= names another folder)"
  presence backbone "$backbone" "no $backbone: ./get_resnet34_backbone.sh fetches it"
  row disk ok "$(df --human-readable --output=avail . | tail -n 1 | tr -d ' ') free here; the environment takes 7G, COCO 2017 up to 45G"
  return "$status"
}

if $check; then
  check_machine
  exit
fi

if [[ -n $vendor ]]; then
  # shellcheck source=scripts/lib/vendor.sh
  source ./scripts/lib/vendor.sh
  check_vendor
  if [[ -n $packages ]]; then install_vendor_software; fi
fi

if finished; then
  if ! $quiet; then echo "setup.sh: $venv is up to date"; fi
  exit
fi

if [[ -d $venv && ! -e $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
  die "VENV=$venv holds other files and is no Python environment; name an empty or new folder"
fi
mkdir -p "$venv" || die "cannot make $venv; name another folder with VENV="

# Two calls at once: the second waits, then finds the work done.
exec 9<"$venv"
if ! flock --nonblock 9; then
  echo "setup.sh: another setup.sh is at work in $venv; waiting for it"
  flock 9
  if finished; then exit; fi
fi

if [[ -f $venv/.installed && $(head -n 1 "$venv/.installed") == 'detection-training[dev] '* ]]; then extras='[dev]'; fi
usable || make_environment
if [[ -n $vendor ]]; then install_wheels; fi
install_packages
echo "setup.sh: $venv is ready"
