#!/usr/bin/env bash
# The oldest versions that pyproject.toml allows, in an environment of their own: oldest.sh VENV   (some minutes, 5.5 GB)
# Reads PYTHON (an interpreter of 3.11 or newer) and TORCH_INDEX (an extra package index for torch).
# uv takes the lowest version of what pyproject.toml names, and the newest that goes with it of what these need in turn.
# torch goes first and alone, so that TORCH_INDEX may give a build without CUDA, and nothing newer comes with it.
set -euo pipefail
venv=${1:?usage: oldest.sh VENV}
cd "$(dirname "$0")/.."
"${PYTHON:-python3}" -m venv "$venv"
python=$venv/bin/python
torch=$(sed -n 's/^ *"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)
"$python" -m pip install -q --disable-pip-version-check 'setuptools>=77' wheel uv
"$python" -m pip install -q --disable-pip-version-check --no-deps "torch==$torch.*" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
"$python" -m uv pip compile -q --python "$python" --resolution lowest-direct --extra dev --extra train -o "$venv/oldest.txt" pyproject.toml
"$python" -m uv pip install -q --python "$python" -r "$venv/oldest.txt"
"$python" -m uv pip install -q --python "$python" --no-deps --no-build-isolation -e .
"$python" -m uv pip list --python "$python"
