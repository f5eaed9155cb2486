#!/usr/bin/env bash
# A real SGLang on a machine without a GPU, for tests: install.sh VENV      (about 2 minutes, 2.7 GB)
# Reads PYTHON and TORCH_INDEX, see on_cpu.sh.
# This tree goes in as an editable install, because SGLang finds our plugin by its entry point.
# SGLang's own requirements want CUDA builds, so it is installed without them; requirements.txt lists what it imports.
set -euo pipefail
venv=${1:?usage: install.sh VENV}
here=$(cd "$(dirname "$0")" && pwd)
source "$here/on_cpu.sh"
begin_venv -r "$here/requirements.txt" setuptools wheel
install --no-deps torchvision==0.28.0 sglang==0.5.17
install sglang-router==0.3.2
install --no-deps --no-build-isolation -e "$here/../.."
declare_torchvision
mkdir -p "$site/sgl_kernel"
cp "$here/sgl_kernel_shim.py" "$site/sgl_kernel/__init__.py"
"$venv/bin/python" -c 'import sglang; print("set-up: sglang", sglang.__version__)'
