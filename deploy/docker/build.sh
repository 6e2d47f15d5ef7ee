#!/usr/bin/env bash
# Build the image weakseg/NAME:VERSION with docker, podman or buildah, whichever works here; `make image` made the wheel first.
#
#   deploy/docker/build.sh NAME
#
#   BASE      another base image                  SOURCE    address of the source code, for the label
#   BUILDER   one of the three, if there are more WHEELS    folder of packages: none are fetched (podman and buildah)
#   STORAGE   buildah's and podman's own options, such as "--root /var/tmp/images --storage-driver vfs"
#   OPTIONS   of its `build`, such as "--isolation chroot"
set -euo pipefail
cd "$(dirname "$0")/../.."

fail() { echo "image: $1" >&2 && exit 2; }

name=${1:-}
file=deploy/docker/Dockerfile
case $name in
serve-cpu | serve-cpu-crf) target=serve ;;
serve-gpu) target=serve file=deploy/docker/serve-gpu.Dockerfile ;;
train | batch) target=$name ;;
*) fail "expected NAME=serve-cpu, serve-cpu-crf, serve-gpu, train or batch, got '$name'" ;;
esac

works() { # the client of docker may be there without its daemon
    case $1 in
    docker) docker info >/dev/null 2>&1 ;;
    *) command -v "$1" >/dev/null ;;
    esac
}
if [ -z "${BUILDER:-}" ]; then
    for candidate in docker podman buildah; do
        if works $candidate; then BUILDER=$candidate && break; fi
    done
fi
[ -n "${BUILDER:-}" ] || fail "found neither a docker that reaches its daemon, nor podman, nor buildah: install one of them"
[ "$(ls dist/*.whl 2>/dev/null | wc -l)" = 1 ] || fail "expected one wheel in dist/, got $(ls dist/*.whl 2>/dev/null | wc -l): run make dist"

version=$(basename dist/*.whl | cut -d- -f2)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain --untracked-files=no 2>/dev/null)" ] || revision+=-dirty

build=(--file "$file" --target "$target" --tag "weakseg/$name:$version"
    --build-arg "NAME=$name" --build-arg "VERSION=$version" --build-arg "REVISION=$revision" --build-arg "SOURCE=${SOURCE:-}")
[ -z "${BASE:-}" ] || build+=(--build-arg "BASE=$BASE")
if [ -n "${WHEELS:-}" ]; then
    [ "$BUILDER" != docker ] || fail "docker mounts no folder while it builds: unset WHEELS, or use BUILDER=buildah"
    build+=(--volume "$(realpath "$WHEELS"):/wheels:ro" --build-arg PIP_NO_INDEX=1 --build-arg PIP_FIND_LINKS=/wheels)
fi
# OCI's format has no HEALTHCHECK.
[ "$BUILDER" = docker ] || build+=(--format docker)

# shellcheck disable=SC2086  # several options in a string
exec "$BUILDER" ${STORAGE:-} build "${build[@]}" ${OPTIONS:-} .
