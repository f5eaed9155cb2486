"""The compiled CPU library: a plain C ABI, found beside this file and loaded with ctypes (which releases the GIL)."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

ABI_VERSION = 5
NAME = "_vtengine_cpu.so"
ISAS = {"auto": 0, "scalar": 1, "avx2": 2, "avx512": 3}


class LibraryMissing(RuntimeError):
    """There is no usable library; the message says why and what to do."""


@functools.cache
def _find() -> ctypes.CDLL | str:
    path = Path(__file__).parent / NAME
    if not path.is_file():
        return (
            "the C++ extension was not built (no C++ compiler at install time?); install g++ or clang++, then "
            "`pip install --no-build-isolation -e .`"
        )
    try:
        library = ctypes.CDLL(str(path))
        version = library.vt_abi_version()
    except (OSError, AttributeError) as error:
        return f"the C++ extension does not load: {error}; rebuild it: `pip install --no-build-isolation -e .`"
    if version != ABI_VERSION:
        return (
            f"the C++ extension has ABI version {version}, these Python files need {ABI_VERSION}; rebuild it: "
            "`pip install --no-build-isolation -e .`"
        )
    return library


def load() -> ctypes.CDLL:
    """The library, loaded once per process. LibraryMissing: it is not there or does not fit."""
    found = _find()
    if isinstance(found, str):
        raise LibraryMissing(found)
    return found


def missing(function: str) -> str | None:
    """Why the library does not have this function here, or None."""
    try:
        loaded = load()
    except LibraryMissing as error:
        return str(error)
    if not hasattr(loaded, function):
        return "the C++ extension is older than this op; rebuild it: `pip install --no-build-isolation -e .`"
    return None


def isas() -> tuple[str, ...]:
    """Instruction sets that this machine can run, the fastest first; empty without a library."""
    if isinstance(_find(), str):
        return ()
    bits = load().vt_available_isas()
    return tuple(name for name, number in reversed(ISAS.items()) if number and bits & (1 << number))
