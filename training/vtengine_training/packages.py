"""Optional packages: whether they are here, found out without importing them."""

from __future__ import annotations

import importlib.util


def check_installed(name: str, extra: str, field: str) -> None:
    """Raises ValueError with the command that installs it. field: what in the configuration wants it."""
    if not is_installed(name):
        raise ValueError(f"{field}: needs {name}, which is missing; pip install 'vtengine[{extra}]'")


def is_installed(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # sys.modules says that it is not to be had
        return False
    return spec is not None and spec.origin is not None  # a folder ./wandb is no package
