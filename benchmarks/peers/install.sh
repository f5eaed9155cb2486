#!/usr/bin/env bash
# What the benchmarks compare with, in an environment of its own: install.sh VENV
# Reads PYTHON (an interpreter of 3.11 or newer) and TORCH_INDEX (an extra package index for torch).
# Every *.txt here is installed, each with its dependencies held to constraints.txt; every *.nodeps without any.
# torch goes first, so that no peer pulls a CUDA build; vtengine itself last, so that a suite runs in one process.
set -euo pipefail
venv=${1:?usage: install.sh VENV}
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
source "$root/tests/sglang_env/on_cpu.sh"
"${PYTHON:-python3}" -m venv "$venv"
install() { "$venv/bin/python" -m pip install -q --disable-pip-version-check -c "$root/constraints.txt" "$@"; }
install torch ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
install 'setuptools>=77' wheel
for list in "$here"/*.txt; do
    echo "set-up: $(basename "$list")"
    install -r "$list"
done
for list in "$here"/*.nodeps; do
    [ -e "$list" ] || continue
    echo "set-up: $(basename "$list"), without dependencies"
    install --no-deps -r "$list"
done
install --no-build-isolation -e "$root[hf]" pytest pytest-timeout hypothesis
declare_torchvision
"$venv/bin/python" -c 'import torch, torchvision; print("set-up: torch", torch.__version__, "torchvision", torchvision.__version__)'
