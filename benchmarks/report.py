"""Renders benchmarks/results/*.json: the tables of README.md and of pages below docs/, and data that the product reads.

A table stands between `<!-- results:NAME -->` and `<!-- /results -->`; NAME is a table that a result document names in
its `tables` (columns with headings, an optional filter), or a suite, which then shows all plain columns. Data are JSON
files that the product reads; a result document names them in its `data`.
`--check` writes nothing and exits 1 where a page differs from the results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/benchmarks.md", "docs/kernels.md", "docs/training.md", "docs/training-grpo.md")
MARKED = re.compile(r"(<!-- results:(?P<name>[\w.-]+) -->\n)(?P<body>.*?)(<!-- /results -->)", re.DOTALL)


def load_tables(folder: Path) -> dict[str, str]:
    """Rendered Markdown by table name. ValueError: two results name the same table, or one comes from a quick run."""
    tables: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("quick"):
            raise ValueError(f"{path.name}: comes from a quick run; run the suite without --quick")
        named = {result["suite"]: {}, **result.get("tables", {})}
        for name, table in named.items():
            if name in tables:
                raise ValueError(f"{path.name}: table {name!r} is named by two results")
            tables[name] = render(result, table)
    return tables


def render(result: dict[str, Any], table: dict[str, Any]) -> str:
    """One Markdown table with a closing line that says where the numbers come from."""
    rows = [row for row in result["rows"] if all(row.get(k) == v for k, v in table.get("where", {}).items())]
    columns: dict[str, str] = table.get("columns") or {
        key: key for row in result["rows"] for key, value in row.items() if not isinstance(value, (list, dict))
    }
    numeric = {key for key in columns if any(isinstance(row.get(key), (int, float)) for row in rows)}
    lines = [
        "| " + " | ".join(columns.values()) + " |",
        "|" + "|".join("---:" if key in numeric else "---" for key in columns) + "|",
        *("| " + " | ".join(cell(row.get(key)) for key in columns) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n\n" + source_line(result) + "\n"


def cell(value: object) -> str:
    """One value: three significant digits, thousands separated, an absent one as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace("|", "\\|")


def source_line(result: dict[str, Any]) -> str:
    """Where and with what the rows were measured."""
    stamp = result["stamp"]
    machine, versions = stamp["machine"], stamp["versions"]
    wide = " with AVX-512" if "avx512f" in machine.get("features", ()) else ""
    where = machine["gpu"] or f"{machine['cpu']}{wide}, {machine['cores']} cores"
    commit = (stamp["commit"] or "unknown")[:10] + (" with local changes" if stamp["dirty"] else "")
    with_what = ", ".join(
        f"{name} {versions[name]}" for name in ("python", "torch", "transformers") if name in versions
    )
    return (
        f"*{where}; {with_what}; commit {commit}; {stamp['date'][:10]}; `benchmarks/results/{result['suite']}.json`.*"
    )


def fill(text: str, tables: dict[str, str], page: str) -> str:
    """The page with every marked table replaced. ValueError: a marker without a result."""

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in tables:
            raise ValueError(f"{page}: no result holds the table {name!r}; there are: {', '.join(tables) or 'none'}")
        return f"{match[1]}{tables[name]}{match[4]}"

    opened, closed = text.count("<!-- results:"), len(MARKED.findall(text))
    if opened != closed:
        raise ValueError(f"{page}: {opened} tables are opened but {closed} are closed by <!-- /results -->")
    return MARKED.sub(replace, text)


def load_data(folder: Path) -> dict[str, str]:
    """Text by file of the product, with the result that it comes from."""
    files = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for name, data in result.get("data", {}).items():
            files[name] = json.dumps(data | {"source": source_line(result).strip("*")}, indent=1) + "\n"
    return files


def update(root: Path, *, check: bool) -> list[str]:
    """The files that differ from the results; they are rewritten unless `check`."""
    results = root / "benchmarks" / "results"
    tables, wanted = load_tables(results), load_data(results)
    pages = {page: (root / page).read_text(encoding="utf-8") for page in PAGES if (root / page).is_file()}
    wanted |= {page: fill(text, tables, page) for page, text in pages.items()}
    known = pages | {name: (root / name).read_text(encoding="utf-8") for name in wanted if (root / name).is_file()}
    changed = [name for name, text in wanted.items() if known.get(name) != text]
    if not check:
        for name in changed:
            (root / name).write_text(wanted[name], encoding="utf-8")
    return changed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/report.py", description="Render result tables into the docs.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is out of date")
    args = parser.parse_args(argv)
    try:
        changed = update(ROOT, check=args.check)
    except ValueError as error:
        print("error:", error, file=sys.stderr)
        return 2
    for page in changed:
        print(("out of date: " if args.check else "updated: ") + page)
    return int(args.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
