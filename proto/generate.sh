#!/usr/bin/env bash
# Generate the stubs from the .proto files here: proto/weakseg/v1 -> weakseg/v1, proto/inference -> serve/inference. They are
# committed and never edited.
#
#   proto/generate.sh            write them
#   proto/generate.sh --check    exit 1 if they are not what would be written
#   proto/generate.sh --lint     buf lint, and buf breaking against the frozen contract (`buf` in .venv or on the PATH)
#   proto/generate.sh --freeze   write the frozen contract, proto/contract.binpb: what clients out there may rely on
#
# grpcio-tools lives in an environment of its own, .venv-proto, created here when absent: stubs of 1.71.2 import under
# protobuf 5, 6 and 7; those of later releases do not import under 5.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(grpcio-tools==1.71.2 mypy-protobuf==3.6.0 googleapis-common-protos==1.70.0 "setuptools<81")
python=.venv-proto/bin/python
folders=(weakseg/v1 serve/inference)

if ! "$python" -c 'import grpc_tools, mypy_protobuf, google.rpc' 2>/dev/null; then
    echo "proto: creating .venv-proto" >&2
    "${PYTHON:-python3}" -m venv .venv-proto
    "$python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"
fi

# google/rpc/status.proto comes with googleapis-common-protos, google/protobuf/*.proto with grpcio-tools.
googleapis=$("$python" -c 'import google.rpc; print(next(iter(google.rpc.__path__)) + "/../..")')

protoc() {
    PATH="$PWD/.venv-proto/bin:$PATH" "$python" -m grpc_tools.protoc -I "$googleapis" "$@"
}

generate() { # generate FROM TO ROOT: stubs of the .proto files of the folder FROM into ROOT/TO, importable as TO
    mkdir -p "$3"
    protoc -I "$2=$1" --python_out="$3" --grpc_python_out="$3" --mypy_out=quiet:"$3" --mypy_grpc_out=quiet:"$3" "$1"/*.proto
    echo "\"\"\"Stubs generated from $1 by proto/generate.sh; never edited.\"\"\"" >"$3/$2/__init__.py"
}

image() { # image FILE OPTION...: a FileDescriptorSet of ours, of what they import, and of the details of errors
    local file=$1 protos
    shift
    mapfile -t protos < <(cd proto && find weakseg inference -name '*.proto' | sort)
    protoc -I proto --include_imports --descriptor_set_out="$file" "$@" "${protos[@]}" google/rpc/error_details.proto
}

our_files=(--config proto/buf.yaml --path weakseg --path inference)

stubs() { # stubs ROOT: everything, below ROOT
    generate proto/weakseg/v1 weakseg/v1 "$1"
    generate proto/inference serve/inference "$1"
}

temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT

case "${1:-}" in
"")
    stubs "$temporary"
    for folder in "${folders[@]}"; do
        mkdir -p "$folder"
        rm -f "$folder"/*.py "$folder"/*.pyi
        cp "$temporary/$folder"/* "$folder"
    done
    ;;
--check)
    stubs "$temporary"
    for folder in "${folders[@]}"; do
        if ! diff -r --exclude=__pycache__ "$folder" "$temporary/$folder"; then
            echo "stubs are stale: run make proto" >&2
            exit 1
        fi
    done
    ;;
--lint)
    # Offline buf cannot resolve google.rpc, so it looks at images that protoc made, and of them only at our files.
    PATH="$PWD/.venv/bin:$PATH"
    image "$temporary/image.binpb" --include_source_info
    buf lint "$temporary/image.binpb" "${our_files[@]}"
    buf breaking "$temporary/image.binpb" --against proto/contract.binpb "${our_files[@]}"
    ;;
--freeze)
    image proto/contract.binpb
    ;;
*)
    echo "usage: proto/generate.sh [--check|--lint|--freeze]" >&2
    exit 2
    ;;
esac
