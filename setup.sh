#!/usr/bin/env bash
# Create the Python environment in .venv with the packages that this project needs. A second call does nothing.
# The project itself is not installed: it runs from its folder.
set -euo pipefail

usage() {
  cat <<'END'
usage: ./setup.sh [--dev] [--latest | --system-site-packages | --vendor NAME [--packages DIR]] [--torch-index URL]
                  [--quiet] [--check]

Installs the exact versions of constraints.txt, which the tests passed with, except with the three flags in the middle.
An environment keeps that choice: .packages in it says which one. An environment that setup.sh did not create is never
cleared. Its packages stay as they are, and only missing ones are added.

  --dev                   also install what the tests and linters need
  --latest                install the latest versions that pyproject.toml allows, and upgrade to them in each call
  --system-site-packages  use the torch of this machine or container image
  --torch-index URL       take torch and torchvision from another package index, now and in later calls. PyTorch's wheels
                          for CPUs are a tenth of the download: https://download.pytorch.org/whl/cpu
  --quiet                 print nothing if everything is up to date
  --check                 only list what is installed and what is missing; exits with 1 if a required item is missing
  --vendor NAME           prepare the machine for its accelerators: iluvatar, cambricon, nvidia, amd or cpu
  --packages DIR          software from the vendor: apt-packages.txt (names of system packages), installers (*.run, *.sh,
                          run in the order of their names) and wheels (torch-*.whl, apex-*.whl, others), which replace
                          those of the package index. Finished steps are skipped, and a failure stops the script

environment:
  INSTALL_ARGS_NAME  arguments of an installer, by the first word of its file name: INSTALL_ARGS_COREX='--silent'
  VENV               folder of the environment (.venv)
  PYTHON             interpreter to create it with (the first working one of python3.13, 3.12, 3.11 and python3)
END
}

die() {
  printf 'error: %s\n' "$1" >&2
  exit "${2:-2}"
}

extras='' versions='' system=false quiet=false check=false vendor='' packages='' torch_index=''
while (($#)); do
  case $1 in
    --dev) extras='[dev]' ;;
    --latest) versions=latest ;;
    --system-site-packages) system=true versions=system ;;
    --quiet) quiet=true ;;
    --check) check=true ;;
    --vendor | --packages | --torch-index)
      (($# > 1)) || die "$1 needs a value. See ./setup.sh --help"
      name=${1#--}
      printf -v "${name//-/_}" %s "$2"
      shift
      ;;
    -h | --help) usage && exit ;;
    *) die "unknown argument '$1'. See ./setup.sh --help" ;;
  esac
  shift
done
[[ -z $packages || -n $vendor ]] || die "--packages $packages: needs --vendor NAME. Pass both"
[[ -z $torch_index || ($system == false && -z $packages) ]] || die "--torch-index $torch_index: torch comes from this machine or --packages. Omit one of them"
if [[ -n $packages ]]; then packages=$(realpath --canonicalize-missing "$packages"); fi

if [[ -n $vendor ]]; then versions=vendor; fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$(realpath --canonicalize-missing "${VENV:-$root/.venv}")
python=$venv/bin/python
cd "$root"

# Without a flag, keep what the environment was installed with.
upgrade=false
if [[ $versions == latest ]]; then upgrade=true; fi
if [[ -z $versions && -f $venv/.packages ]]; then versions=$(<"$venv/.packages"); fi
if [[ -z $versions && ! -e $venv/.created && ! -e $venv/.installed && -e $venv/pyvenv.cfg ]]; then versions=own; fi
if [[ -z $torch_index && -f $venv/.torch-index ]]; then torch_index=$(<"$venv/.torch-index"); fi
case $versions in
  latest | vendor | system | own) ;;
  *) versions="constraints.txt sha256:$(sha256sum constraints.txt | cut -c 1-12)" ;;
esac

# stamp EXTRAS VERSIONS: prints the text that marks an installation with these extras as finished.
stamp() {
  printf '%s\n' "detection-training$1, $("$python" -V 2>&1)" ${2:+"$2"} ${torch_index:+"$torch_index"} "$(<pyproject.toml)"
}

is_installed() {
  local stamped
  [[ -x $python && -f $venv/.installed ]] || return
  stamped=$(sed '1s/ in .*, /, /' "$venv/.installed") # earlier releases named the folder, and no versions
  [[ $stamped == "$(stamp "$1" "$versions")" || $stamped == "$(stamp "$1" '')" ]]
}

uses_system_packages() {
  grep --quiet --ignore-case '^include-system-site-packages = true' "$venv/pyvenv.cfg" 2>/dev/null
}

is_up_to_date() {
  if $upgrade; then return 1; fi
  if [[ -e $venv/.installing ]]; then return 1; fi
  if [[ -n $vendor ]] && ! wheels_installed; then return 1; fi
  if $system && ! uses_system_packages; then return 1; fi
  if [[ -n ${PYTHON:-} && $("$PYTHON" -V 2>&1) != "$("$python" -V 2>&1)" ]]; then return 1; fi
  is_installed '[dev]' || { [[ -z $extras ]] && is_installed ''; }
}

is_supported() {
  "$1" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

can_create_venv() {
  "$1" -c 'import ensurepip, venv' 2>/dev/null || { $system && "$1" -c 'import pip, venv' 2>/dev/null; }
}

# find_python: sets `base` to a working interpreter. A version manager's shim may be on PATH without working.
find_python() {
  local candidate bare=''
  if [[ -n ${PYTHON:-} ]]; then
    is_supported "$PYTHON" || die "PYTHON=$PYTHON does not run or is not Python 3.11 to 3.13. Name another interpreter"
  fi
  for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3; do
    is_supported "$candidate" || continue
    if can_create_venv "$candidate"; then
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
  die "no Python 3.11 to 3.13 on PATH. Install one (Debian, Ubuntu: apt-get install python3 python3-venv) or set PYTHON: PYTHON=/path/to/python3.12 ./setup.sh"
}

has_pip() { "$python" -m pip --version &>/dev/null; }

# check_venv: sets `problem` to the reason why the environment cannot be used as it is, or to nothing.
check_venv() {
  problem=''
  if [[ ! -x $python ]] || ! is_supported "$python"; then
    problem='has no working Python 3.11 to 3.13'
  elif ! has_pip && ! command -v uv >/dev/null; then
    problem='has no pip, and uv is not on PATH. Install one of them'
  elif $system && ! uses_system_packages; then
    problem='was created without --system-site-packages'
  elif [[ -n ${PYTHON:-} && $("$PYTHON" -V 2>&1) != "$("$python" -V 2>&1)" ]]; then
    problem="has $("$python" -V 2>&1), but PYTHON=$PYTHON is another version"
  fi
}

create_venv() {
  local options=()
  find_python
  find "$venv" -mindepth 1 -delete
  touch "$venv/.created"
  if $system; then
    options+=(--system-site-packages)
    if "$base" -c 'import pip' 2>/dev/null; then options+=(--without-pip); fi
  fi
  echo "setup.sh: creating $venv with $("$base" -V 2>&1)"
  "$base" -m venv "${options[@]}" "$venv"
}

# pin_torch: keeps pip from replacing the torch of the image or the vendor with another build.
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

# pin_installed: keeps pip from changing any package of the user's environment, and gives the others their tested versions.
pin_installed() {
  "$python" - >"$venv/constraints.txt" <<'END'
import re
from importlib.metadata import distributions


def normalize(name):
    return re.sub("[-_.]+", "-", name).lower()


pinned = {normalize(package.name): f"{package.name}=={package.version}" for package in distributions() if package.name}
tested = [line.strip() for line in open("constraints.txt") if re.match("[A-Za-z]", line)]
print(*pinned.values(), *(line for line in tested if normalize(re.split("[^A-Za-z0-9._-]", line)[0]) not in pinned), sep="\n")
END
}

# print_requirements EXTRA ...: prints what pyproject.toml requires, also for the extras.
print_requirements() {
  "$python" - "$@" <<'END'
import re
import sys
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]


def expand(lines):
    for line in lines:
        extra = re.fullmatch(re.escape(project["name"]) + r"\[(.*)\]", line)
        if extra:
            yield from expand(project["optional-dependencies"][extra[1]])
        else:
            yield line


print(*expand(project["dependencies"]), sep="\n")
for extra in sys.argv[1:]:
    print(*expand(project["optional-dependencies"][extra]), sep="\n")
END
}

# pip_install WORD ...: installs packages with pip, or with uv in an environment without pip.
pip_install() {
  if has_pip; then
    "$python" -m pip install --disable-pip-version-check --no-input "$@"
  else
    uv pip install --python "$python" "$@"
  fi || {
    rm -f "$venv/.installing" # pip rolls back a failed installation; only a kill leaves a partial package
    die "pip could not install the packages (see its message above). Fix the cause and run ./setup.sh again" 1
  }
}

install_torch() {
  local options=("$@") stored=''
  if [[ -f $venv/.torch-index ]]; then stored=$(<"$venv/.torch-index"); fi
  if [[ $stored != "$torch_index" ]]; then options+=(--force-reinstall); fi
  pip_install --no-deps --index-url "$torch_index" "${options[@]}" torch torchvision
  printf '%s\n' "$torch_index" >"$venv/.torch-index"
  if [[ $versions == own ]]; then pin_installed; else pin_torch; fi
}

install_packages() {
  local options=() extra=()
  if uses_system_packages; then pin_torch; fi
  if [[ $versions == own ]]; then pin_installed; fi
  if [[ -f $venv/constraints.txt ]]; then options+=(--constraint "$venv/constraints.txt"); fi
  case $versions in
    constraints.txt*) options+=(--constraint constraints.txt) ;;
    latest) options+=(--upgrade) ;;
  esac
  echo "setup.sh: installing the packages: torch and its libraries take several GB, this can take minutes"
  touch "$venv/.installing"
  if [[ -n $torch_index ]]; then
    install_torch "${options[@]}"
    options+=(--constraint "$venv/constraints.txt")
  fi
  if [[ $versions == latest ]] && has_pip; then options+=(--upgrade-strategy eager); fi
  if [[ -n $extras ]]; then extra=(dev); fi
  print_requirements "${extra[@]}" >"$venv/requirements.txt"
  pip_install "${options[@]}" --requirement "$venv/requirements.txt"
  printf '%s\n' "$versions" >"$venv/.packages"
  stamp "$extras" "$versions" >"$venv/.installed"
  rm "$venv/.installing"
}

print_row() { printf '%-16s %-9s %s\n' "$1" "$2" "$3"; }

# print_optional NAME FILE HINT [TEXT]: prints a row about a file that a run does not require, with TEXT or its name.
print_optional() {
  if [[ -e $2 ]]; then print_row "$1" ok "${4:-$2}"; else print_row "$1" none "$3"; fi
}

check_packages() {
  "$python" - <<'END'
import importlib
import re
import tomllib
from importlib.metadata import PackageNotFoundError, distributions, version

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
missing = 0
for name in (re.match(r"[\w.-]+", line)[0] for line in project["dependencies"]):
    try:
        importlib.import_module({"pillow": "PIL", "pyyaml": "yaml"}.get(name, name.replace("-", "_")))
        print(f"{name:16} ok        {version(name)}")
    except (ImportError, OSError, RuntimeError, PackageNotFoundError) as error:
        missing += 1
        print(f"{name:16} missing   {str(error).splitlines()[0]}")
for extra, lines in project["optional-dependencies"].items():
    names = {re.match(r"[\w.-]+", line)[0] for line in lines if "[" not in line}
    absent = sorted(name for name in names if not any(distributions(name=name)))
    row = f"optional, missing: {', '.join(absent)}" if absent else f"{len(names)} packages"
    print(f"{f'[{extra}]':16} {'none' if absent else 'ok':9} {row}")
try:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count()
    found = f"{count} × {accelerator}" if accelerator else "torch finds none: runs use the CPU"
    print(f"{'accelerator':16} {'ok' if accelerator else 'none':9} {found}")
except (ImportError, AttributeError):
    pass
try:
    print(f"{'apex':16} ok        {version('apex')}")
except PackageNotFoundError:
    print(f"{'apex':16} none      optional: only for --optimizer-backend apex")
raise SystemExit(missing > 0)
END
}

check_machine() {
  local status=0 coco=${DATADIR:-data/coco} backbone=${PRETRAINED_DIR:-data}/resnet34-333f7ec4.pth command
  if [[ -x $python ]] && is_supported "$python"; then
    print_row python ok "$("$python" -V 2>&1), $python"
    print_optional versions "$venv/.packages" 'not known: run ./setup.sh' "$(cat "$venv/.packages" 2>/dev/null)"
    check_packages || status=1
  else
    print_row python missing "no environment in $venv: ./setup.sh creates it"
    status=1
  fi
  if [[ $status == 0 ]] && ! is_up_to_date; then
    print_row installation missing "$venv does not match pyproject.toml or constraints.txt: run ./setup.sh"
    status=1
  fi
  for command in curl nvidia-smi docker podman; do
    print_optional "$command" "$(command -v "$command")" optional
  done
  print_optional 'toy data' data/toy/annotations './run_and_time.sh generates it'
  print_optional 'COCO-sized data' data/synthetic_coco/annotations 'DGXSYSTEM=synthetic_coco ./run_and_time.sh generates it, 20G'
  print_optional COCO "$coco/train2017" "not in $coco: ./init_datasets.sh downloads it (DATADIR= names another folder)"
  print_optional backbone "$backbone" "no $backbone: ./get_resnet34_backbone.sh downloads it"
  print_row disk ok "$(df --human-readable --output=avail . | tail -n 1 | tr -d ' ') free here; the environment takes 7G, COCO 2017 up to 45G"
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

if is_up_to_date; then
  if ! $quiet; then echo "setup.sh: $venv is up to date"; fi
  exit
fi

if [[ -d $venv && ! -e $venv/pyvenv.cfg && ! -e $venv/.created && -n $(ls -A "$venv") ]]; then
  die "VENV=$venv contains other files and is not a Python environment. Name an empty or new folder"
fi
mkdir -p "$venv" || die "cannot create $venv. Name another folder with VENV="

# With two concurrent calls, the second one waits and finds the environment up to date.
exec 9<"$venv"
if ! flock --nonblock 9; then
  echo "setup.sh: waiting for another setup.sh in $venv"
  flock 9
  if is_up_to_date; then exit; fi
fi

if [[ -f $venv/.installed && $(head -n 1 "$venv/.installed") == 'detection-training[dev]'* ]]; then extras='[dev]'; fi
check_venv
if [[ -e $venv/.created && (-n $problem || -e $venv/.installing) || ! -e $venv/pyvenv.cfg ]]; then
  create_venv
elif [[ -n $problem ]]; then
  die "VENV=$venv $problem. setup.sh clears only environments that it created. Name another folder, or remove this one"
fi
if [[ -n $vendor ]]; then install_wheels; fi
install_packages
echo "setup.sh: $venv is ready"
