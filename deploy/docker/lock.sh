#!/usr/bin/env bash
# Write requirements-<image>.lock: every version with its hashes, resolved from the extras of pyproject.toml and, where
# constraints.txt names a version, at that one. What is locked stays; `make lock UPGRADE=1` looks for newer versions.
#
#   deploy/docker/lock.sh [UV]     UV: the program uv
set -euo pipefail
cd "$(dirname "$0")/../.."

uv=${1:-uv}
upgrade=()
if [ -n "${UPGRADE:-}" ]; then upgrade=(--upgrade); fi

lock() { # lock IMAGE PYTHON EXTRAS [OPTION...]
    local image=$1 python=$2 extras=() extra
    for extra in ${3//,/ }; do extras+=(--extra "$extra"); done
    echo "requirements-$image.lock" >&2
    "$uv" pip compile --quiet pyproject.toml "${extras[@]}" "${@:4}" "${upgrade[@]}" \
        --constraints constraints.txt --generate-hashes --no-annotate --custom-compile-command "make lock" \
        --python-version "$python" --python-platform x86_64-manylinux_2_28 --output-file "deploy/docker/requirements-$image.lock"
}

lock serve-cpu 3.11 serve,sign,tracing
lock serve-cpu-crf 3.11 serve,sign,tracing,refine
# CUDA's images are Ubuntu 24.04, whose Python is 3.12. onnxruntime-gpu takes onnxruntime's place: both are the package onnxruntime.
lock serve-gpu 3.12 serve,sign,tracing,gpu --no-emit-package onnxruntime
lock train 3.11 train,hf,export,sign
lock batch 3.11 kuberay,sign
