#!/usr/bin/env bash
# A real SGLang on a machine without a GPU, for tests: install.sh VENV      (about 2 minutes, 2.7 GB)
# Reads PYTHON (an interpreter of 3.11 or newer) and TORCH_INDEX (an extra package index for torch).
# This tree goes in as an editable install, because SGLang finds our plugin by its entry point.
# SGLang's own requirements want CUDA builds, so it is installed without them; requirements.txt lists what it imports.
set -euo pipefail
venv=${1:?usage: install.sh VENV}
here=$(cd "$(dirname "$0")" && pwd)
"${PYTHON:-python3}" -m venv "$venv"
pip="$venv/bin/python -m pip install -q --disable-pip-version-check"
$pip torch==2.13.0 ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}   # first, so that nothing pulls a CUDA build
constraint=$(mktemp)
trap 'rm -f "$constraint"' EXIT
echo torch==2.13.0 > "$constraint"
$pip -c "$constraint" -r "$here/requirements.txt" setuptools wheel
$pip --no-deps torchvision==0.28.0 sglang==0.5.17
$pip sglang-router==0.3.2
$pip --no-deps --no-build-isolation -e "$here/../.."
site=$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
cp "$here/torchvision_cpu_shim.py" "$site/"
echo 'import torchvision_cpu_shim' > "$site/torchvision_cpu_shim.pth"
mkdir -p "$site/sgl_kernel"
cp "$here/sgl_kernel_shim.py" "$site/sgl_kernel/__init__.py"
"$venv/bin/python" -c 'import sglang; print("set-up: sglang", sglang.__version__)'
