#!/usr/bin/env bash
# Generate the stubs in weakseg/v1 from the .proto files here. They are committed and never edited.
#
#   proto/generate.sh            write weakseg/v1
#   proto/generate.sh --check    exit 1 if weakseg/v1 is not what would be written
#   proto/generate.sh --lint     buf lint (needs `buf` in .venv or on the PATH)
#
# grpcio-tools lives in an environment of its own, .venv-proto, created here when absent: stubs of 1.71.2 import under
# protobuf 5, 6 and 7; those of later releases do not import under 5.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(grpcio-tools==1.71.2 mypy-protobuf==3.6.0 googleapis-common-protos==1.70.0 "setuptools<81")
python=.venv-proto/bin/python

if ! "$python" -c 'import grpc_tools, mypy_protobuf, google.rpc' 2>/dev/null; then
    echo "proto: creating .venv-proto" >&2
    "${PYTHON:-python3}" -m venv .venv-proto
    "$python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"
fi

# google/rpc/status.proto comes with googleapis-common-protos, google/protobuf/*.proto with grpcio-tools.
googleapis=$("$python" -c 'import google.rpc; print(next(iter(google.rpc.__path__)) + "/../..")')
mapfile -t protos < <(cd proto && find weakseg -name '*.proto' | sort)

protoc() {
    PATH="$PWD/.venv-proto/bin:$PATH" "$python" -m grpc_tools.protoc -I proto -I "$googleapis" "$@" "${protos[@]}"
}

stubs() { # stubs FOLDER: what FOLDER/weakseg/v1 should hold
    mkdir -p "$1"
    protoc --python_out="$1" --grpc_python_out="$1" --mypy_out=quiet:"$1" --mypy_grpc_out=quiet:"$1"
    echo '"""Stubs generated from proto/weakseg/v1 by proto/generate.sh; never edited."""' >"$1/weakseg/v1/__init__.py"
}

temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT

case "${1:-}" in
"")
    stubs "$temporary"
    mkdir -p weakseg/v1
    rm -f weakseg/v1/*.py weakseg/v1/*.pyi
    cp "$temporary"/weakseg/v1/* weakseg/v1/
    ;;
--check)
    stubs "$temporary"
    if ! diff -r --exclude=__pycache__ weakseg/v1 "$temporary/weakseg/v1"; then
        echo "stubs are stale: run make proto" >&2
        exit 1
    fi
    ;;
--lint)
    # Offline buf cannot resolve google.rpc, so it lints an image that protoc made, and of it only our files.
    protoc --include_imports --include_source_info --descriptor_set_out="$temporary/image.binpb"
    PATH="$PWD/.venv/bin:$PATH" buf lint "$temporary/image.binpb" --config proto/buf.yaml --path weakseg
    ;;
*)
    echo "usage: proto/generate.sh [--check|--lint]" >&2
    exit 2
    ;;
esac
