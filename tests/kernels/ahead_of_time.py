"""Compiles a Triton kernel without a GPU and asks the assembler that comes with Triton what the kernel needs."""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Needs:
    """registers per thread; spill_bytes: stores and loads of registers that did not fit; shared_bytes per program."""

    registers: int
    spill_bytes: int
    shared_bytes: int


def compiled(
    function: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    arch: int,
    folder: Path,
    num_warps: int = 4,
    sixteens: Collection[str] = (),
) -> Needs:
    """types: of the arguments that are neither "i32" nor constants, by name. folder: for the assembler's files.

    sixteens: arguments that are known to be multiples of 16, as pointers are: torch aligns what it allocates, and
    Triton compiles for what it finds at a launch.
    """
    triton = importlib.import_module("triton")
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", arch, 32)
    known = {**types, **dict.fromkeys(constants, "constexpr")}
    signature = {name: known.get(name, "i32") for name in function.arg_names}
    even = {*sixteens, *(name for name, kind in types.items() if kind.startswith("*"))}
    known_of = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(function.arg_names) if name in even}
    source = compiler.ASTSource(function, signature, constexprs=dict(constants), attrs=known_of)
    made = triton.compile(source, target=target, options={"num_warps": num_warps})
    (folder / "kernel.ptx").write_text(made.asm["ptx"])
    ptxas = importlib.import_module("triton.backends.nvidia.compiler").get_ptxas(arch).path
    name = f"sm_{arch}" if arch < 90 else f"sm_{arch}a"
    command = [ptxas, "-v", f"--gpu-name={name}", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    registers = max(map(int, re.findall(r"Used (\d+) registers", said)))
    return Needs(registers, sum(map(int, re.findall(r"(\d+) bytes spill", said))), made.metadata.shared)
