#!/usr/bin/env bash
# Builds the Dockerfile and trains in the image, without a container engine and its daemon.
set -euo pipefail

usage() {
  cat <<'END_USAGE'
usage: tests/container.sh [flags of run_and_time.sh]

Makes a base image of Debian bookworm (debootstrap), builds the Dockerfile on it (buildah), and makes the toy run in there
as a user that is not root, with LOGDIR its only mount and without a network. Without flags it makes three steps and holds
them against what is to be there. It needs root, buildah, debootstrap and iproute2, 20 GB of disk, and takes ten minutes.

environment:
  BUILD_OPTIONS   words for `buildah build`, where pip needs a mirror: "--volume /etc/pip.conf:/etc/pip.conf:ro"
  DEBIAN_MIRROR   (https://deb.debian.org/debian)
  TMPDIR          images lie there while it runs, and are removed (/tmp)
END_USAGE
}

die() {
  printf 'error: %s\n' "$1" >&2
  exit "${2:-2}"
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then usage && exit; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ $EUID == 0 ]] || die "tests/container.sh makes file systems: it needs root"
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
  { tail "$folder/debootstrap.log" && die "debootstrap could not make a Debian" 1; }
base=$(buildah from scratch)
buildah add --quiet "$base" "$folder/debian" / >/dev/null
buildah commit --quiet --rm "$base" localhost/base >/dev/null
rm -rf --one-file-system "$folder/debian"

commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)
read -r -a options <<<"${BUILD_OPTIONS:-}"
buildah build --quiet --layers=false "${options[@]}" --build-arg FROM_IMAGE_NAME=localhost/base \
  --build-arg COMMIT="$commit" --tag localhost/detection .

# says FORMAT TEXT: the image says so of itself.
says() {
  local said
  said=$(buildah inspect --type image --format "$1" localhost/detection)
  [[ $said == *"$2"* ]] || die "the image should say $2 in $1, and says: $said" 1
}
says '{{.OCIv1.Config.User}}' 1000:1000
says '{{.OCIv1.Config.Env}}' "DETECTION_SOURCE_COMMIT=$commit"
says '{{.OCIv1.Config.Labels}}' "org.opencontainers.image.revision:$commit"
says '{{.OCIv1.Config.Labels}}' "org.opencontainers.image.version:$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)"

container=$(buildah from localhost/detection)
for path in .git .ci data/toy; do
  [[ ! -e $(buildah mount "$container")/workspace/detection-training/$path ]] || die "$path is in the image" 1
done
buildah umount "$container" >/dev/null

logs=$folder/the\ logs
mkdir "$logs"
chown 1000:1000 "$logs"
flags=("$@")
if ((${#flags[@]} == 0)); then flags=(--max-steps 3 --log-every 1); fi
status=0
# shellcheck disable=SC2016 # for the other shell
unshare --net bash -c 'ip link set lo up && exec "$@"' bash buildah run --user 1000:1000 --volume "$logs:/results" \
  --env LOGDIR=/results --env DATADIR=/tmp/toy "$container" -- ./run_and_time.sh "${flags[@]}" || status=$?
if (($#)); then exit "$status"; fi

((status == 3)) || die "three steps should end with status 3, and did with $status" 1
log=$(find "$logs" -name result_0.txt -user 1000)
[[ -n $log ]] || die "no log of the user's lies in LOGDIR" 1
grep --quiet '"key": "run_stop"' "$log" || die "the log has no run_stop" 1
[[ -n $(find "$logs" -name 'epoch_0001_step_0000003.pt' -user 1000) ]] || die "the last step's checkpoint is not there" 1
echo "tests/container.sh: the image was built, and trains as user 1000 without a network"
