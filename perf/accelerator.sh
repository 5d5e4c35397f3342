#!/usr/bin/env bash
# What to run first on a new accelerator: conformance in each precision, the tests that need one, then the toy run
# to its target. Takes a few minutes. VECTORS names the conformance vectors, OUT the folder for the outputs.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
out=${OUT:-results/accelerator}
vectors=${VECTORS:-../shared/golden/ssd_reference.npz}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
status=0

if [[ -f $vectors ]]; then
  for precision in fp32 tf32 bf16 fp16; do
    "$python" -m ssd.conform "$vectors" --device auto --precision "$precision" >"$out/conform_$precision.txt" || status=1
    tail -n 1 "$out/conform_$precision.txt"
    grep WRONG "$out/conform_$precision.txt"
  done
else
  echo "no vectors at $vectors: conformance is skipped (VECTORS names them)"
fi
"$python" -m pytest -q -m gpu | tee "$out/pytest_gpu.txt" || status=1
# shellcheck source=/dev/null
. ./config_toy.sh
export RUN_DIR=$out/toy DATADIR=${TOY_DIR:-$out/toy_data}
"$python" -m detection.toy "$DATADIR" || status=1
"$python" -m detection.launch -m ssd.train | tee "$out/toy.txt" | grep -v MLLOG || status=1
"$python" -m torch.utils.collect_env >"$out/environment.txt" 2>&1
exit "$status"
