# shellcheck shell=bash
# Config file and experiments of a system, sourced by run_and_time.sh, run_with_docker.sh and run.sub. The caller
# defines `die`.

# resolve_config FOLDER: from BENCHMARK and DGXSYSTEM, sets `config`, the name of the config file in FOLDER, and
# `mlperf_name`, MLPerf's name of the benchmark.
# shellcheck disable=SC2034 # mlperf_name is read by the caller
resolve_config() {
  local suffix='' files
  export BENCHMARK=${BENCHMARK:-ssd} DGXSYSTEM=${DGXSYSTEM:-toy}
  case $BENCHMARK in
    ssd) mlperf_name=SINGLE_STAGE_DETECTOR ;;
    maskrcnn) mlperf_name=OBJECT_DETECTION suffix=_maskrcnn ;;
    retinanet) mlperf_name=SINGLE_STAGE_DETECTOR suffix=_retinanet ;;
    *) die "BENCHMARK=$BENCHMARK: unknown benchmark. Use ssd, maskrcnn or retinanet" ;;
  esac
  config=config_$DGXSYSTEM$suffix.sh
  files=$(cd "$1" && printf '%s ' config_*"$suffix".sh)
  [[ -f $1/$config ]] || die "DGXSYSTEM=$DGXSYSTEM: $config does not exist. Available: $files"
}

# require_integer NAME MIN MAX: rejects a variable that is set to anything else. Arithmetic would run text as a command.
require_integer() {
  local value=${!1:-}
  [[ -z $value ]] || { [[ $value =~ ^(0|[1-9][0-9]{0,9})$ ]] && ((value >= $2 && value <= $3)); } ||
    die "$1=$value: should be an integer from $2 to $3, without leading zeros. Correct or unset it"
}

# run_experiments WORD ...: becomes detection/engine/experiments.py, which runs outside the environment and containers
# with the first working Python and needs no packages.
run_experiments() {
  local python
  for python in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then
      exec "$python" -m detection.engine.experiments "$@"
    fi
  done
  die "no Python 3.8 or newer on PATH, which runs the experiments. Install python3 or set PYTHON. It needs no packages"
}
