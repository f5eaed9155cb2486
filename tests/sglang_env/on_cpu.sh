# For scripts that make an environment `venv` on a machine without a GPU, to be sourced.
# Reads PYTHON (an interpreter of 3.11 or newer) and TORCH_INDEX (an extra package index for torch).
install() { "$venv/bin/python" -m pip install -q --disable-pip-version-check "$@"; }

# begin_venv PACKAGE...: torch first, so that nothing pulls a CUDA build; then what is named, beside this torch.
begin_venv() {
    "${PYTHON:-python3}" -m venv "$venv"
    install torch==2.13.0 ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
    local constraint
    constraint=$(mktemp)
    echo torch==2.13.0 > "$constraint"
    install -c "$constraint" "$@" || { rm -f "$constraint"; return 1; }
    rm -f "$constraint"
}

# PyPI's torchvision is linked to CUDA: beside a torch without it, its operators must be declared before it is imported.
declare_torchvision() {
    site=$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
    cp "$(dirname "${BASH_SOURCE[0]}")/torchvision_cpu_shim.py" "$site/"
    echo 'import torchvision_cpu_shim' > "$site/torchvision_cpu_shim.pth"
}
