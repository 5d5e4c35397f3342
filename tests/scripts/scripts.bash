# shellcheck shell=bash
# Helpers of the .bats files: the path of the repository, and the HTTP server of serve.py.

repository=$(cd "$BATS_TEST_DIRNAME/../.." && pwd)
export repository
export PYTHONPATH=$repository # of detection.engine.experiments, since the tests copy only the scripts

# mllog_line KEY METADATA: prints a line of an MLPerf log. The stubs use it, too.
mllog_line() {
  echo ":::MLLOG {\"time_ms\": 1, \"event_type\": \"\", \"key\": \"$1\", \"value\": null, \"metadata\": {$2}}"
}
export -f mllog_line

# serve FOLDER [flags of serve.py]: sets `url`, and logs requests in $requests.
serve() {
  local folder=$1 port_file=$BATS_TEST_TMPDIR/port
  shift
  stop_serving
  rm -f "$port_file"
  requests=$BATS_TEST_TMPDIR/requests
  : >"$requests"
  "$(any_python)" "$BATS_TEST_DIRNAME/serve.py" "$folder" "$port_file" "$requests" "$@" 2>/dev/null 3>&- &
  server=$!
  until [[ -s $port_file ]]; do sleep 0.05; done
  url=http://127.0.0.1:$(<"$port_file")
  export url no_proxy=127.0.0.1
}

stop_serving() {
  if [[ -n ${server:-} ]]; then
    kill "$server"
    wait "$server" || true
    server=''
  fi
}

any_python() {
  local venv=${VENV:-$repository/.venv}
  if [[ -x $venv/bin/python ]]; then echo "$venv/bin/python"; else command -v python3; fi
}

# requests_for WORD: prints the number of requests that contain it.
requests_for() {
  grep --count -e "$1" "$requests" || true
}

# small_disk MIB: mounts a disk of that size on $disk, or skips the test if mounting is not permitted.
small_disk() {
  disk=$BATS_TEST_TMPDIR/disk
  mkdir "$disk"
  mount -t tmpfs -o "size=$1m" tmpfs "$disk" 2>/dev/null || skip "mounting a small disk needs root"
}

remove_small_disk() {
  if [[ -n ${disk:-} ]] && mountpoint --quiet "$disk"; then umount "$disk"; fi
}
