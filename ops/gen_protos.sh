#!/usr/bin/env bash
# Regenerates the Python stubs of protos/ into the folder named (default: the repository root, where they are committed).
# --check writes nothing and fails when the committed stubs are not what the schemas give.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

generate() {
  "$python" -m grpc_tools.protoc -I protos \
    -I "$("$python" -c 'import google.rpc, os; print(os.path.dirname(os.path.dirname(list(google.rpc.__path__)[0])))')" \
    --python_out="$1" --pyi_out="$1" --grpc_python_out="$1" protos/moesaic/v1/*.proto
}

if [ "${1:-}" = "--check" ]; then
  fresh=$(mktemp -d)
  trap 'rm -rf "$fresh"' EXIT
  generate "$fresh"
  diff -r -x __init__.py -x __pycache__ "$fresh/moesaic/v1" moesaic/v1 ||
    { echo "moesaic/v1 is not what protos/ gives: run 'make protos'" >&2; exit 1; }
else
  generate .
fi
