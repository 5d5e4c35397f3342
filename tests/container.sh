#!/usr/bin/env bash
# Build the Dockerfile and train in the image, without a container engine and its daemon.
set -euo pipefail

usage() {
  cat <<'END_USAGE'
usage: tests/container.sh [flags of run_and_time.sh]

Creates a base image of Debian bookworm (debootstrap) and builds the Dockerfile on it (buildah). Then makes the toy run in
the image as a non-root user, with LOGDIR as the only mount and without a network. Without flags it trains three steps and
checks the results. Needs root, buildah, debootstrap and iproute2, 20 GB of disk and ten minutes.

environment:
  BUILD_OPTIONS   options of `buildah build`, for example if pip needs a mirror: "--volume /etc/pip.conf:/etc/pip.conf:ro"
  DEBIAN_MIRROR   Debian mirror (https://deb.debian.org/debian)
  TMPDIR          folder of the temporary images (/tmp)
END_USAGE
}

die() {
  printf 'error: %s\n' "$1" >&2
  exit "${2:-2}"
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then usage && exit; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ $EUID == 0 ]] || die "tests/container.sh must run as root: it creates file systems"
for command in buildah debootstrap ip; do
  command -v "$command" >/dev/null ||
    die "$command is not on PATH. On Debian or Ubuntu: apt-get install buildah debootstrap iproute2"
done

folder=$(mktemp -d)
printf '[storage]\ndriver = "%s"\ngraphroot = "%s"\nrunroot = "%s"\n' \
  "${STORAGE_DRIVER:-overlay}" "$folder/images" "$folder/containers" >"$folder/storage.conf"
export CONTAINERS_STORAGE_CONF=$folder/storage.conf BUILDAH_ISOLATION=chroot

remove() {
  buildah rm --all >/dev/null || true
  buildah rmi --all --force >/dev/null || true
  umount "$folder/images/overlay" 2>/dev/null || true
  rm -rf --one-file-system "$folder"
}
trap remove EXIT

debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$folder/debian" \
  "${DEBIAN_MIRROR:-https://deb.debian.org/debian}" >"$folder/debootstrap.log" ||
  { tail "$folder/debootstrap.log" && die "debootstrap could not install Debian" 1; }
base=$(buildah from scratch)
buildah add --quiet "$base" "$folder/debian" / >/dev/null
buildah commit --quiet --rm "$base" localhost/base >/dev/null
rm -rf --one-file-system "$folder/debian"

commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)
read -r -a options <<<"${BUILD_OPTIONS:-}"
buildah build --quiet --layers=false "${options[@]}" --build-arg FROM_IMAGE_NAME=localhost/base \
  --build-arg COMMIT="$commit" --tag localhost/detection .

# expect_metadata FORMAT TEXT: fails unless this metadata of the image contains the text.
expect_metadata() {
  local actual
  actual=$(buildah inspect --type image --format "$1" localhost/detection)
  [[ $actual == *"$2"* ]] || die "$1 of the image should contain $2, but is: $actual" 1
}
expect_metadata '{{.OCIv1.Config.User}}' 1000:1000
expect_metadata '{{.OCIv1.Config.Env}}' "DETECTION_SOURCE_COMMIT=$commit"
expect_metadata '{{.OCIv1.Config.Env}}' ECHO_LOG=1
expect_metadata '{{.OCIv1.Config.Labels}}' "org.opencontainers.image.revision:$commit"
expect_metadata '{{.OCIv1.Config.Labels}}' "org.opencontainers.image.version:$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)"

container=$(buildah from localhost/detection)
for path in .git .ci tests/golden data/toy; do
  [[ ! -e $(buildah mount "$container")/workspace/detection-training/$path ]] || die "$path is in the image" 1
done
buildah umount "$container" >/dev/null

logs=$folder/the\ logs
mkdir "$logs"
chown 1000:1000 "$logs"
flags=("$@")
if ((${#flags[@]} == 0)); then flags=(--max-steps 3 --log-every 1); fi
status=0
# shellcheck disable=SC2016 # expanded by the inner shell
unshare --net bash -c 'ip link set lo up && exec "$@"' bash buildah run --user 1000:1000 --volume "$logs:/results" \
  --env LOGDIR=/results --env DATADIR=/tmp/toy "$container" -- ./run_and_time.sh "${flags[@]}" || status=$?
if (($#)); then exit "$status"; fi

((status == 0)) || die "three steps should exit with status 0, but exited with $status" 1
log=$(find "$logs" -name result_0.txt -user 1000)
[[ -n $log ]] || die "LOGDIR contains no log owned by user 1000" 1
grep --quiet '"key": "run_stop"' "$log" || die "the log has no run_stop" 1
[[ -n $(find "$logs" -name 'epoch_0001_step_0000003.pt' -user 1000) ]] || die "the checkpoint of the last step is missing" 1
echo "tests/container.sh: the image builds, and trains as user 1000 without a network"
