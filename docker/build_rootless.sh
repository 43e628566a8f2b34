#!/usr/bin/env bash
# Build docker/Dockerfile without a Docker engine and without an image registry; the CPU image, unless DEVICE says cuda.
#
#   apt-get install --no-install-recommends buildah podman runc debootstrap
#   docker/build_rootless.sh [TAG]          then: docker/try_image.sh [TAG]
#
# debootstrap makes what `FROM` would pull, the same Debian release without documentation; buildah executes every other
# step as it is written. pip's configuration on this machine (indexes, certificates, constraints) is lent to the build.
set -euo pipefail
cd "$(dirname "$0")/.."
tag=${1:-localhost/homodistil:${DEVICE:-cpu}}
base=localhost/homodistil-base:bookworm
limits="--ulimit nofile=1024:1024 --ulimit nproc=4096:4096" # the defaults are above what a virtual machine may grant
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

make_base() {
  debootstrap --variant=minbase bookworm "$scratch/base" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"}
  tar -C "$scratch/base" -c . | podman import - "$base"
}

# One pip.conf of all that pip knows here, and a mount for every file or folder that it names.
lend_pip() {
  { echo "[global]"
    python3 -m pip config list | sed -n "s/^[^.]*\.\([a-z-]*\)='\(.*\)'$/\1 = \2/p" |
      awk -F' = ' '{ value[$1] = $2 } END { for (key in value) print key " = " value[key] }'
  } > "$scratch/pip.conf"
  cert=$(sed -n 's/^cert = //p' "$scratch/pip.conf")
  sed -i 's/^cert = .*/cert = \/etc\/pip.cert/' "$scratch/pip.conf" # its own path is the ca-certificates package's
  mounts=(--volume "$scratch/pip.conf:/etc/pip.conf:ro" ${cert:+--volume "$cert:/etc/pip.cert:ro"})
  # shellcheck disable=SC2013 # words are meant: a value may name several
  for word in $(cut -d= -f2- "$scratch/pip.conf"); do
    path=${word#file://}
    path=${path%/simple} # an index's files lie beside it
    [[ $path == /* && -e $path ]] && mounts+=(--volume "$path:$path:ro")
  done
  return 0
}

podman image exists "$base" || make_base
lend_pip
# shellcheck disable=SC2086
buildah bud --format docker --layers --runtime runc --network host $limits "${mounts[@]}" \
  --build-arg BASE="$base" --build-arg DEVICE="${DEVICE:-cpu}" --build-arg TORCH_INDEX="${TORCH_INDEX:-}" \
  --build-arg REVISION="$(git rev-parse HEAD 2>/dev/null || echo unknown)" \
  --file docker/Dockerfile --tag "$tag" .
