"""What pyproject.toml cannot say: the optional C++ library of the CPU kernels (csrc/cpu).

It has a plain C ABI and is loaded with ctypes, so one build serves every Python, and no torch is needed to build it.
Without a C++ compiler, or when compiling fails, the install goes on without it; `vtengine doctor` then says so.

VTENGINE_NO_CPP=1 leaves it out on purpose.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARY = "vtengine_kernels._vtengine_cpu"
SOURCES = sorted(path.as_posix() for path in Path("csrc/cpu").glob("*.cpp"))
HEADERS = sorted(path.as_posix() for path in [*Path("csrc/cpu").glob("*.h"), *Path("csrc/include").rglob("*.h")])
# -ffp-contract=off: a fused multiply-add where the C++ says none would round differently from Pillow
# -Wno-*uninitialized: g++'s own vector headers trip these warnings, hundreds of times
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-pthread", "-g0"]
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]


class BuildLibrary(build_ext):
    """Names the file without the Python version, exports no module entry point, and never fails the install."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            if not ext.optional:
                raise
            print(
                f"warning: the C++ library was not built ({error}). vtengine works without it, but prepares images\n"
                "warning: much more slowly. To have it, install g++ or clang++ and install again.",
                file=sys.stderr,
            )

    def copy_extensions_to_source(self) -> None:
        """In an editable install: copies what was built, and only that."""
        built = self.extensions
        self.extensions = [ext for ext in built if Path(self.get_ext_fullpath_in_build(ext)).is_file()]
        super().copy_extensions_to_source()
        self.extensions = built

    def get_ext_fullpath_in_build(self, ext: Extension) -> str:
        return os.path.join(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))


class TagWheel(bdist_wheel):
    """A wheel for every Python 3 of this platform: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


extensions = [
    Extension(
        LIBRARY,
        SOURCES,
        include_dirs=["csrc/include"],
        depends=HEADERS,
        extra_compile_args=FLAGS,
        extra_link_args=["-pthread"],
        language="c++",
        optional=True,
    )
]

setup(
    ext_modules=[] if os.environ.get("VTENGINE_NO_CPP") == "1" else extensions,
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": TagWheel},
)
