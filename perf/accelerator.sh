#!/usr/bin/env bash
# First checks on a new accelerator: conformance in each precision, the GPU tests, the toy runs of both benchmarks to
# their targets, then the performance benchmarks. Takes several minutes, most of them for the performance benchmarks.
# BENCH=0 skips those. OUT names the output folder.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
out=${OUT:-results/accelerator}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
status=0

for workload in ssd maskrcnn retinanet; do
  for precision in fp32 tf32 bf16 fp16; do
    log=$out/conformance_${workload}_$precision.txt
    "$python" -m "$workload" conformance "tests/golden/$workload/${workload}_reference.npz" --device auto \
      --precision "$precision" >"$log" || status=1
    tail -n 1 "$log"
    grep FAIL "$log"
  done
done
"$python" -m pytest -q -m gpu | tee "$out/pytest_gpu.txt" || status=1
export DATADIR=${TOY_DIR:-$out/toy_data} DGXSYSTEM=toy
"$python" -m detection.synthetic.toy "$DATADIR" || status=1
for benchmark in ssd maskrcnn; do
  suffix=
  if [[ $benchmark == maskrcnn ]]; then suffix=_maskrcnn; fi
  (
    # shellcheck source=/dev/null
    . "./config_toy$suffix.sh"
    export RUN_DIR=$out/toy$suffix BENCHMARK=$benchmark
    "$python" -m detection.runtime.launch -m "$benchmark.train" | tee "$out/toy$suffix.txt" | grep -v MLLOG
    exit "${PIPESTATUS[0]}"
  ) || status=1
done
"$python" -m ssd inspect >"$out/preflight.txt" || status=1
if [[ ${BENCH:-1} == 1 ]]; then
  "$python" -m perf.run --quick --check --allow-dirty --out "$out/bench.json" | tee "$out/bench.txt" || status=1
  "$python" -m perf.run maskrcnn --quick --allow-dirty --out "$out/bench_maskrcnn.json" | tee "$out/bench_maskrcnn.txt" || status=1
fi
"$python" -m torch.utils.collect_env >"$out/environment.txt" 2>&1
exit "$status"
