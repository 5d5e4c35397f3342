# shellcheck shell=bash
# Config file of a system, sourced by run_and_time.sh, run_with_docker.sh and run.sub. The caller defines `die`.

# resolve_config FOLDER: from BENCHMARK and DGXSYSTEM, sets `config`, the name of the config file in FOLDER, and
# `mlperf_name`, MLPerf's name of the benchmark.
# shellcheck disable=SC2034 # mlperf_name is read by the caller
resolve_config() {
  local suffix='' files
  export BENCHMARK=${BENCHMARK:-ssd} DGXSYSTEM=${DGXSYSTEM:-toy}
  case $BENCHMARK in
    ssd) mlperf_name=SINGLE_STAGE_DETECTOR ;;
    maskrcnn) mlperf_name=OBJECT_DETECTION suffix=_maskrcnn ;;
    *) die "BENCHMARK=$BENCHMARK: unknown benchmark. Use ssd or maskrcnn" ;;
  esac
  config=config_$DGXSYSTEM$suffix.sh
  files=$(cd "$1" && printf '%s ' config_*"$suffix".sh)
  [[ -f $1/$config ]] || die "DGXSYSTEM=$DGXSYSTEM: $config does not exist. Available: $files"
}
