# shellcheck shell=bash
# Sourced by the scripts that download: a file is there under its name only when it is whole and its sum is right.

die() {
  printf 'error: %s\n' "$1" >&2
  exit "${2:-1}"
}

command -v curl >/dev/null || die "this needs curl. Debian, Ubuntu: apt-get install curl" 2

# has_sum COMMAND SUM FILE: does the file's checksum begin with SUM? COMMAND is md5sum or sha256sum.
has_sum() {
  local sum
  sum=$("$1" <"$3")
  [[ $sum == "$2"* ]]
}

# content_length URL: bytes, or nothing where the server does not say.
content_length() {
  curl --silent --fail --location --head --connect-timeout 30 "$1" |
    awk 'tolower($1) == "content-length:" { bytes = $2 + 0 } END { if (bytes) printf "%d\n", bytes }' || true
}

# free_space FOLDER
free_space() {
  df --human-readable --output=avail "$1" | tail -n 1 | tr -d ' '
}

size() {
  if [[ -e $1 ]]; then stat --format %s "$1"; else echo 0; fi
}

# download URL FILE COMMAND SUM: resumes FILE.part, goes on where a connection breaks, then checks and renames.
# Gives up after four tries in a row that brought nothing.
download() {
  local url=$1 file=$2 part=$2.part tries=0 before status code meter=(--silent --show-error)
  if [[ -t 2 ]]; then meter=(--progress-bar); fi
  while true; do
    before=$(size "$part")
    echo "downloading $url$( ((before)) && echo " from byte $before on")"
    status=0
    code=$(curl "${meter[@]}" --fail --location --continue-at - --connect-timeout 30 --speed-limit 1000 \
      --speed-time 60 --write-out '%{http_code}' --output "$part" "$url") || status=$?
    case $status/$code in
      0/* | */416) break ;; # 416: nothing left to send, so the part is whole or its sum is wrong
      33/*) rm -f "$part" ;;
      23/*) die "cannot write $part, its disk has $(free_space "${file%/*}") free. Make room and run this again: it goes on where it stopped" ;;
      22/4[01]?) die "$url: the server answers $code" ;;
    esac
    if (($(size "$part") > before)); then tries=1; else tries=$((tries + 1)); fi
    if ((tries == 4)); then
      die "$url: gave up, curl's exit status is $status. Run this again: it goes on where it stopped"
    fi
    sleep "$tries"
  done
  echo "checking $file"
  if ! has_sum "$3" "$4" "$part"; then
    rm -f "$part"
    die "$url: the $3 of what was downloaded does not begin with $4. It was removed: run this again, or try another mirror"
  fi
  mv "$part" "$file"
}
