#!/usr/bin/env bash
# A real SGLang on a machine without a GPU, for tests: install.sh VENV      (about 2 minutes, 2.7 GB)
# Reads SGLANG_VERSION (the pin where it is not set); PYTHON and TORCH_INDEX, see on_cpu.sh.
# This tree goes in as an editable install, because SGLang finds our plugin by its entry point.
# SGLang's own requirements want CUDA builds, so it is installed without them; requirements.txt lists what it imports,
# in the versions that this SGLang asks for.
set -euo pipefail
venv=${1:?usage: install.sh VENV}
here=$(cd "$(dirname "$0")" && pwd)
source "$here/on_cpu.sh"
begin_venv setuptools wheel
"$venv/bin/python" -m pip download -q --no-deps -d "$venv/wheels" "sglang==${SGLANG_VERSION:-0.5.17}"
"$venv/bin/python" "$here/pins.py" "$venv"/wheels/sglang-*.whl > "$venv/pins.txt"
install -c "$venv/pins.txt" -r "$here/requirements.txt"
install --no-deps torchvision==0.28.0 "$venv"/wheels/sglang-*.whl
rm -r "$venv/wheels"
install sglang-router==0.3.2
install --no-deps --no-build-isolation -e "$here/../.."
declare_torchvision
mkdir -p "$site/sgl_kernel"
cp "$here/sgl_kernel_shim.py" "$site/sgl_kernel/__init__.py"
"$venv/bin/python" -c 'import sglang; print("set-up: sglang", sglang.__version__)'
