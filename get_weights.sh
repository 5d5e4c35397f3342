#!/usr/bin/env bash
# Download public weights (--help). A second call does nothing, and an interrupted one continues.
set -euo pipefail

script_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${VENV:-$script_dir/.venv}/bin/python
case " $* " in *' --npz '*) "$script_dir/setup.sh" --quiet ;; esac
if [[ ! -x $python ]]; then python=python3; fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo 'error: Python 3.11 or later is not installed. Run ./setup.sh first' >&2
  exit 2
fi
export PYTHONPATH=$script_dir
exec "$python" -m detection.checkpoint.weights_download \
  --source-url "${WEIGHTS_URL:-}" --pretrained-dir "${PRETRAINED_DIR:-$script_dir/data}" "$@"
