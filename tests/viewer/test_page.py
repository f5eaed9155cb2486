"""The page as a file: self-contained, bounded, robust against odd rows."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from vtengine.viewer import PageOptions, Totals, render_page
from vtengine.viewer.render import read_rows, script_json
from vtengine.vision.plan import PixelLimits, ViewPlan, plan_crop


def pictures(page: Path) -> dict[str, Image.Image]:
    found = re.findall(
        r'<script type="text/plain" id="(p\d+)">data:image/webp;base64,([^<]+)</script>', page.read_text()
    )
    return {key: Image.open(io.BytesIO(base64.b64decode(data))) for key, data in found}


def rows_of(page: Path) -> list[dict[str, Any]]:
    chunks = re.findall(r'<script type="application/json" class="rows">(.*?)</script>', page.read_text(), re.DOTALL)
    return [row for chunk in chunks for row in json.loads(chunk)]


def test_the_image_is_embedded_once_at_both_views(make_page: Callable[..., Path], two_turn_rows: list) -> None:
    page = make_page(two_turn_rows)
    assert {image.size for image in pictures(page).values()} == {(84, 56), (168, 112)}
    plain, closer, gone = rows_of(page)
    assert [(view["name"], view["shown"]) for view in plain["_views"]] == [("low", True), ("high", False)]
    assert [(view["name"], view["shown"]) for view in closer["_views"]] == [("low", True), ("high", True)]
    assert gone["_views"] == []


def test_the_page_needs_no_network(make_page: Callable[..., Path], two_turn_rows: list) -> None:
    text = make_page(two_turn_rows).read_text()
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text and not re.search(r"<(link|iframe)\b|\bsrc=[\"']", text)


def test_images_are_found_where_the_run_read_them(tmp_path: Path, run_folder: Path, two_turn_rows: list) -> None:
    elsewhere = tmp_path / "results" / "deep"
    elsewhere.mkdir(parents=True)
    row = two_turn_rows[0] | {"image_path": "../../ball.png"}
    (elsewhere / "out.jsonl").write_text(json.dumps(row) + "\n")
    render_page(elsewhere / "out.jsonl", elsewhere / "out.html", PageOptions("x"))
    assert len(pictures(elsewhere / "out.html")) == 2
    render_page(elsewhere / "out.jsonl", elsewhere / "out.html", PageOptions("x", image_root=tmp_path / "results"))
    assert "No such file" in rows_of(elsewhere / "out.html")[0]["_views"][0]["note"]


def test_data_urls_are_shown_and_not_repeated(
    make_page: Callable[..., Path], run_folder: Path, two_turn_rows: list
) -> None:
    url = "data:image/png;base64," + base64.b64encode((run_folder / "ball.png").read_bytes()).decode()
    page = make_page([two_turn_rows[0] | {"image": url}])
    assert len(pictures(page)) == 2 and url not in page.read_text()


def test_a_crop_and_a_scaled_view_are_shown(
    make_page: Callable[..., Path], run_folder: Path, two_turn_rows: list
) -> None:
    def call(arguments: dict) -> str:
        name = "crop_image" if "box" in arguments else "resize_image"
        return f"<think>x</think><tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"

    plan = plan_crop(168, 112, ViewPlan(None, height=56, width=84), (42, 0, 84, 28), PixelLimits())
    first = two_turn_rows[0]["turns"][0]
    crop = two_turn_rows[1]["turns"][1] | {"images": [{"width": plan.width, "height": plan.height}]}
    scaled = two_turn_rows[1]["turns"][1] | {"images": [{"width": 140, "height": 84}]}
    calls = {
        "crop": {"box": [42, 0, 84, 28]},
        "resize": {"action": "resize", "scale": 0.8},
        "odd": {"box": [0, 0, 60, 9]},
    }
    rows = [
        two_turn_rows[1] | {"turns": [first | {"text": call(arguments), "action": action}, turn]}
        for (action, arguments), turn in zip(calls.items(), (crop, scaled, scaled), strict=True)
    ]
    shown = [row["_views"][2] for row in rows_of(make_page(rows))]
    assert [(view["name"], view["key"] is not None) for view in shown] == [
        ("crop", True),
        ("scaled", True),
        ("other", False),
    ]


def test_pictures_stay_within_the_budget(make_page: Callable[..., Path], two_turn_rows: list) -> None:
    page = make_page(two_turn_rows, image_budget_bytes=0)
    assert not pictures(page)
    assert "size limit" in rows_of(page)[0]["_views"][0]["note"]


def test_totals(two_turn_rows: list) -> None:
    totals = Totals.of(two_turn_rows)
    assert (totals.rows, totals.scored, totals.correct, totals.answered, totals.upscaled) == (3, 2, 1, 2, 1)
    assert (totals.accuracy, totals.upscale_ratio, totals.visual_ratio) == (0.5, 0.5, 0.75)
    assert (totals.resumed_tokens, totals.later_prompt_tokens, totals.unfinished) == (32, 72, 1)
    assert totals.left_out == "; 1 rejected or failed left out" and Totals.of(two_turn_rows[:2]).left_out == ""
    unanswerable = {key: value for key, value in two_turn_rows[2].items() if key != "expected"}
    assert (
        Totals.of([two_turn_rows[0], unanswerable]).left_out == ""
    )  # without an answer it could not be right or wrong


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    path.write_bytes(b'{"status": "answered"}\n{"status": "ans')
    assert len(list(read_rows(path))) == 1


def test_a_pipe_and_a_link_are_written_to_and_stay_what_they_are(
    tmp_path: Path, make_page: Callable[..., Path], two_turn_rows: list
) -> None:
    page = make_page(two_turn_rows)
    source, pipe, link, real = (tmp_path / name for name in ("rows.jsonl", "pipe", "link.html", "real.html"))
    source.write_text("".join(json.dumps(row) + "\n" for row in two_turn_rows))
    os.mkfifo(pipe)
    link.symlink_to(real)
    options = PageOptions(page.stem, tmp_path)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_bytes)
        render_page(source, pipe, options)
        render_page(source, link, options)
        assert read.result(60) == real.read_bytes() and b"</html>" in real.read_bytes()
    assert pipe.is_fifo() and link.is_symlink() and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("text", ["not json\n", '{"id": 1}\n', "[]\n"])
def test_a_foreign_file_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "o.jsonl").write_text('{"status": "answered"}\n' + text)
    with pytest.raises(ValueError, match="line 2"):
        render_page(tmp_path / "o.jsonl", tmp_path / "o.html", PageOptions("x"))
    assert not list(tmp_path.glob("*.html*"))


def test_script_json_cannot_close_its_element() -> None:
    text = script_json(["</script><!--", "\u2028&amp;"])
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == ["</script><!--", "\u2028&amp;"]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 200)
    | st.floats()
    | st.sampled_from(["", "low", "ball.png", "data:,x", "\x00"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["width", "height", "images", "text"]), inner)
    ),
    max_leaves=8,
)
row_keys = st.sampled_from(
    [
        "id",
        "image",
        "image_path",
        "turns",
        "correct",
        "visual_tokens",
        "visual_tokens_full",
        "expected",
        "error",
        "reward",
    ]
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(row_keys, json_values), max_size=3))
@example([{"image": "", "image_path": "\0"}])
def test_any_rows_make_a_page(make_page: Callable[..., Path], rows: list[dict]) -> None:
    page = make_page([row | {"status": "answered"} for row in rows])
    assert len(rows_of(page)) == len(rows)
