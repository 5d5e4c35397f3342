# shellcheck shell=bash
# Which file is a system's: sourced by run_and_time.sh, run_with_docker.sh and run.sub. The caller has `die`.

# find_system FOLDER: of BENCHMARK and DGXSYSTEM sets `config`, the file in FOLDER, and `result`, MLPerf's name of the
# benchmark.
# shellcheck disable=SC2034 # result is read by the caller
find_system() {
  local suffix='' files
  export BENCHMARK=${BENCHMARK:-ssd} DGXSYSTEM=${DGXSYSTEM:-toy}
  case $BENCHMARK in
    ssd) result=SINGLE_STAGE_DETECTOR ;;
    maskrcnn) result=OBJECT_DETECTION suffix=_maskrcnn ;;
    *) die "BENCHMARK=$BENCHMARK: there is no such benchmark. There are: ssd, maskrcnn" ;;
  esac
  config=config_$DGXSYSTEM$suffix.sh
  files=$(cd "$1" && printf '%s ' config_*"$suffix".sh)
  [[ -f $1/$config ]] || die "DGXSYSTEM=$DGXSYSTEM: there is no $config. There are: $files"
}
