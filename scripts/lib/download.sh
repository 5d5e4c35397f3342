# shellcheck shell=bash
# Verified downloads, sourced by init_datasets.sh.
# A file gets its final name only when it is complete and its checksum matches.

die() {
  printf 'error: %s\n' "$1" >&2
  exit "${2:-1}"
}

# A download continues if nobody reads what it prints.
trap '' PIPE
echo() { builtin echo "$@" 2>/dev/null || true; }

command -v curl >/dev/null || die "curl is not installed. Debian, Ubuntu: apt-get install curl" 2

# checksum_matches COMMAND SUM FILE: succeeds if the checksum of FILE begins with SUM. COMMAND is md5sum or sha256sum.
checksum_matches() {
  local sum
  sum=$("$1" <"$3")
  [[ $sum == "$2"* ]]
}

# content_length URL: prints the size in bytes, or nothing if the server does not report it.
content_length() {
  curl --silent --fail --location --head --connect-timeout 30 "$1" |
    awk 'tolower($1) == "content-length:" { bytes = $2 + 0 } END { if (bytes) printf "%d\n", bytes }' || true
}

# free_space FOLDER
free_space() {
  df --human-readable --output=avail "$1" | tail -n 1 | tr -d ' '
}

# file_size FILE: prints its bytes, or 0 if it does not exist.
file_size() {
  if [[ -e $1 ]]; then stat --format %s "$1"; else echo 0; fi
}

# download URL FILE COMMAND SUM: resumes FILE.part, retries when the connection breaks, verifies and renames.
# Gives up after four consecutive attempts that transfer nothing.
download() {
  local url=$1 file=$2 part=$2.part tries=0 before status code meter=(--silent --show-error)
  if [[ -t 2 ]]; then meter=(--progress-bar); fi
  while true; do
    before=$(file_size "$part")
    echo "downloading $url$( ((before)) && echo " from byte $before")"
    status=0
    code=$(curl "${meter[@]}" --fail --location --continue-at - --connect-timeout 30 --speed-limit 1000 \
      --speed-time 60 --write-out '%{http_code}' --output "$part" "$url") || status=$?
    case $status/$code in
      0/* | */416) break ;; # 416: nothing left to send. The part is complete, or its checksum is wrong
      33/*) rm -f "$part" ;;
      23/*) die "cannot write $part, $(free_space "${file%/*}") free on its disk. Free some space and run this again: the download resumes" ;;
      22/4[01]?) die "$url: the server returned status $code" ;;
    esac
    if (($(file_size "$part") > before)); then tries=1; else tries=$((tries + 1)); fi
    if ((tries == 4)); then
      die "$url: download failed, curl's exit status is $status. Run this again: the download resumes"
    fi
    sleep "$tries"
  done
  echo "verifying $file"
  if ! checksum_matches "$3" "$4" "$part"; then
    rm -f "$part"
    die "$url: the $3 of the downloaded file does not begin with $4. The file was removed: run this again, or use another mirror"
  fi
  mv "$part" "$file"
}
