"""`vtengine doctor`: what is installed, which kernels run and why not the others, what is slower and how to fix it."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from vtengine.cli.arguments import installed_version
from vtengine.cli.errors import OK, STOPPED, one_line
from vtengine.stamp import cpu_features, cpu_name, memory_gib, usable_cores

State = Literal["ok", "slower", "missing"]

REQUIRED = ("torch", "numpy", "pillow", "safetensors", "tokenizers", "rich", "jinja2")
OPTIONAL = (
    ("triton", "Triton kernels; comes with torch on CUDA machines"),
    ("flash-attn", "attention on CUDA; without it torch's own flash kernels are used"),
    ("huggingface_hub", "--model with a Hugging Face id: pip install 'vtengine[hf]'"),
    ("transformers", "parity tests and comparisons only: pip install 'vtengine[hf]'"),
    ("uvicorn", "vtengine serve: pip install 'vtengine[serve]'"),
    ("sglang", "rollouts on an SGLang engine"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report. ok: fine; slower: works, `detail` says what is lost; missing: stops the main job."""

    group: str
    name: str
    state: State
    detail: str


def run(arguments: argparse.Namespace) -> int:
    """Prints the report; status 1 when something that the main job needs is missing."""
    findings = examine()
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _print(findings)
    return STOPPED if any(finding.state == "missing" for finding in findings) else OK


def examine() -> list[Finding]:
    return [*_machine(), *_packages(), *_torch(), *_kernels(), *_model()]


def _machine() -> list[Finding]:
    memory = memory_gib()
    threads = os.environ.get("OMP_NUM_THREADS")
    limited = f", OMP_NUM_THREADS={threads} limits torch to that many" if threads else ""
    return [
        Finding("machine", "vtengine", "ok", f"{installed_version()} in {Path(__file__).resolve().parents[1]}"),
        Finding("machine", "python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("machine", "cpu", "ok", f"{cpu_name()}, {usable_cores()} cores usable{limited}"),
        Finding("machine", "cpu features", "ok", ", ".join(cpu_features()) or "none that kernels use"),
        Finding("machine", "memory", "ok", "unknown" if memory is None else f"{memory:.1f} GiB"),
    ]


def _packages() -> list[Finding]:
    findings = []
    for name in REQUIRED:
        version = _version(name)
        fix = f"not installed: pip install {name}"
        findings.append(Finding("packages", name, "ok" if version else "missing", version or fix))
    for name, use in OPTIONAL:
        version = _version(name)
        findings.append(Finding("packages", name, "ok", version or f"not installed (optional): {use}"))
    return findings


def _torch() -> list[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Finding("torch", "import", "missing", one_line(error))]
    findings = [Finding("torch", "threads", "ok", f"{torch.get_num_threads()}")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            detail = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute {device.major}.{device.minor}"
            findings.append(Finding("torch", f"cuda:{index}", "ok", detail))
    else:
        built = f"torch is built for CUDA {torch.version.cuda} but sees no device" if torch.version.cuda else ""
        detail = f"{built or 'torch is a CPU build'}: models run on the CPU"
        findings.append(Finding("torch", "cuda", "slower", detail))
    return findings


def _kernels() -> list[Finding]:
    try:
        from vtengine_kernels import dispatch

        entries = dispatch.report()
    except Exception as error:  # a broken extension must not break the report about it
        return [Finding("kernels", "dispatch", "missing", one_line(error))]
    findings = []
    for entry in entries:
        state: State = "ok" if entry.available or not entry.cost else "slower"
        detail = entry.reason if entry.available else "; ".join(filter(None, (entry.reason, entry.cost)))
        name = f"{entry.op} {entry.impl}"
        findings.append(Finding("kernels", name, state, detail if entry.available else f"not available: {detail}"))
    return findings


def _model() -> list[Finding]:
    from vtengine.cli.models import shipped_model

    folder = shipped_model()
    if not (folder / "config.json").is_file():
        detail = f"not in {folder}: --model glance does not work; other models do"
        return [Finding("models", "glance", "slower", detail)]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return [Finding("models", "glance", "ok", f"{size / 2**20:.1f} MB in {folder}")]


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    from vtengine.cli.tables import print_table

    console = Console(highlight=False)
    marks = {"ok": "[green]ok[/]", "slower": "[yellow]slower[/]", "missing": "[red]missing[/]"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for column in ("state", "group", "name"):
        table.add_column(column, no_wrap=True)
    table.add_column("detail", overflow="fold")
    group = ""
    for finding in findings:
        shown = finding.group if finding.group != group else ""
        table.add_row(marks[finding.state], f"[dim]{shown}[/]", finding.name, _plain(finding.detail))
        group = finding.group
    print_table(table, 160)
    counts = {state: sum(finding.state == state for finding in findings) for state in ("slower", "missing")}
    if counts["missing"]:
        console.print(f"\n[red]{counts['missing']} needed part(s) missing; see the lines above.[/]")
    elif counts["slower"]:
        console.print(f"\nEverything works; {counts['slower']} thing(s) could be faster, see above.")
    else:
        console.print("\nEverything is here.")


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "found, version unknown" if _importable(name) else None


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name.replace("-", "_")) is not None
    except (ImportError, ValueError):
        return False
