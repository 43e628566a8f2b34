#!/usr/bin/env bash
# Run a recipe to its end inside the image as compose.yaml and k8s/ do: not root, nothing writable but the mounts, no
# capabilities, no network. For podman, where there is no Docker engine:
#
#   docker/try_image.sh [TAG] [launcher, and its arguments ...]
#
# Leaves runs/ and data/ below $OUTPUT (a new folder by default), and says where.
set -euo pipefail
tag=${1:-localhost/homodistil:cpu}
shift || true
output=${OUTPUT:-$(mktemp -d)}
mkdir -p "$output"/{data,runs,cache}
chown 1000:1000 "$output"/{data,runs,cache}
echo "$output"
exec podman --runtime runc run --rm --name "${NAME:-homodistil-try}" --no-healthcheck \
  --read-only --read-only-tmpfs=false --user 1000:1000 \
  --cap-drop ALL --security-opt no-new-privileges --network none --tmpfs /tmp:mode=1777 --shm-size 1g \
  --ulimit nofile=1024:1024 --ulimit nproc=4096:4096 --env OMP_NUM_THREADS \
  --volume "$output/data:/opt/homodistil/data" --volume "$output/runs:/opt/homodistil/runs" \
  --volume "$output/cache:/cache" "$tag" "$@"
