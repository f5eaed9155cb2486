"""Writes the page: one HTML file that needs no network, streamed row by row so that large runs fit into memory.

Rows hold model output and are untrusted. The page keeps them as JSON data in which `<`, `>` and `&` are escaped; the
script shows them as text nodes only; a content security policy forbids every script but its own, by hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any

import jinja2
from markupsafe import Markup

from vtengine.viewer.pictures import PictureBook
from vtengine.viewer.totals import Totals, TotalsCounter

CHUNK_ROWS = 64


@dataclass(frozen=True)
class PageOptions:
    """`image_root`: folder that image paths start at, instead of where the run found them.

    `image_budget_bytes`: bound on all embedded pictures together.
    """

    title: str
    image_root: Path | None = None
    image_budget_bytes: int = 96 * 2**20


def render_page(source: Path, target: Path, options: PageOptions) -> Totals:
    """Reads OUT.jsonl twice (totals, then rows) and writes the page. Returns the totals.

    Raises ValueError for a line that is no row, with its number, and OSError for files that cannot be read or written.
    """
    counter = TotalsCounter()
    for row in read_rows(source):
        counter.add(row)
    totals = counter.totals()
    if target.exists() and not target.is_file():  # a pipe or a device is written to, never replaced
        with target.open("w", encoding="utf-8", newline="\n") as file:
            _write(file, source, totals, options)
        return totals
    target = target.resolve()  # a link stays one
    partial = target.with_name(target.name + ".part")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            _write(file, source, totals, options)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return totals


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of an OUT.jsonl; a torn last line, as an interrupted run leaves it, is passed over."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw, parse_constant=lambda _: None, parse_float=_finite)
            except (ValueError, RecursionError):
                if not raw.endswith(b"\n"):
                    return
                raise ValueError(
                    f"{path}: line {number} is not JSON; is this an output of `vtengine generate`?"
                ) from None
            if not isinstance(row, dict) or "status" not in row:
                raise ValueError(f"{path}: line {number} is no row of `vtengine generate` (it has no status)")
            yield row


def _write(file: IO[str], source: Path, totals: Totals, options: PageOptions) -> None:

    files = resources.files("vtengine.viewer")
    script, style = (files.joinpath(name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(files.joinpath("page.html").read_text(encoding="utf-8"))
    book = PictureBook(source.parent, options.image_root, options.image_budget_bytes)
    pieces = template.generate(
        title=options.title,
        tiles=list(_tiles(totals)),
        script=Markup(script),
        style=Markup(style),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        parts=_parts(source, book),
    )
    for piece in pieces:
        file.write(piece)


def _parts(source: Path, book: PictureBook) -> Iterator[Markup]:
    """Script elements with data: each picture once, before the chunk of rows that shows it first."""
    chunk: list[dict[str, Any]] = []
    for number, row in enumerate(read_rows(source), start=1):
        chunk.append(_page_row(number, row, book))
        for key, url in book.fresh.items():
            yield Markup(f'<script type="text/plain" id="{key}">{url}</script>\n')
        book.fresh.clear()
        if len(chunk) == CHUNK_ROWS:
            yield _rows_element(chunk)
            chunk = []
    yield _rows_element(chunk)


def _rows_element(chunk: list[dict[str, Any]]) -> Markup:
    return Markup(f'<script type="application/json" class="rows">{script_json(chunk)}</script>\n')


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def script_json(value: Any) -> str:
    """JSON that is safe inside a script element: no `<`, `>`, `&`, and ASCII only."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _page_row(number: int, row: Mapping[str, Any], book: PictureBook) -> dict[str, Any]:
    page_row = dict(row)
    if isinstance(row.get("image"), str) and len(row["image"]) > 512:
        page_row["image"] = f"{row['image'][:32]}… ({len(row['image']):,} characters)"
    page_row["_number"] = number
    page_row["_views"] = [asdict(view) for view in book.views(row)]
    return page_row


def _tiles(totals: Totals) -> Iterator[tuple[str, str, str, float | None]]:
    """(name, value, explanation, share or None) of each figure at the top of the page."""
    yield "Rows", f"{totals.rows:,}", ", ".join(f"{count:,} {name}" for name, count in totals.statuses), None
    if totals.accuracy is not None:
        counts = f"{totals.correct:,} of {totals.scored:,} right{totals.left_out}"
        yield "Accuracy", f"{totals.accuracy:.1%}", counts, totals.accuracy
    if totals.upscale_ratio is not None:
        yield (
            "Asked for more pixels",
            f"{totals.upscale_ratio:.1%}",
            f"{totals.upscaled:,} of {totals.looked:,} rows",
            (totals.upscale_ratio),
        )
    if totals.visual_ratio is not None:
        counts = f"{totals.visual_tokens:,} of {totals.visual_tokens_full:,} always-high"
        yield "Visual tokens", f"{totals.visual_ratio:.1%}", counts, totals.visual_ratio
    if totals.later_prompt_tokens:
        share = totals.resumed_tokens / totals.later_prompt_tokens
        yield (
            "Resumed from cache",
            f"{totals.resumed_tokens:,}",
            f"{share:.1%} of the prompt tokens of later turns",
            share,
        )
    if totals.completion_tokens:
        yield "Tokens", f"{totals.prompt_tokens:,}", f"in the prompts, {totals.completion_tokens:,} written", None
