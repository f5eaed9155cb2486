"""The page in a real headless browser: what it shows, its filters, hostile text."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

HOSTILE = (
    '</script><script>document.title="pwned"</script><img src=x onerror="document.title=\'pwned\'">'
    "<svg onload=document.title='pwned'><b onmouseover=alert(1)>x</b><!-- {{ 7*7 }} javascript:alert(1) \u2028"
)


def articles(dom: str) -> list[str]:
    return re.findall(r"<article.*?</article>", dom, re.DOTALL)


def count(dom: str) -> str:
    found = re.search(r'<span id="count"[^>]*>([^<]*)</span>', dom)
    assert found is not None
    return found[1]


def test_rows_turns_and_views_are_shown(
    make_page: Callable[..., Path], browse: Callable[..., str], two_turn_rows: list
) -> None:
    dom = browse(make_page(two_turn_rows))
    plain, closer, gone = articles(dom)
    assert count(dom) == "3 rows"
    assert plain.count("<img") == 2 and closer.count("<img") == 2 and "not shown" in plain
    assert "Too small." in closer and "resize_image" in closer and closer.count('class="turn"') == 2
    assert (
        '<div class="segment think">' in plain
        and '<div class="segment answer">' in plain
        and "segment action" in closer
    )
    classes = [re.search(r'<article(?: class="([^"]*)")?', one)[1] or "" for one in (plain, closer, gone)]  # type: ignore[index]
    assert ["right" in classes[0], "wrong" in classes[1], "right" in classes[2] or "wrong" in classes[2]] == [
        True, True, False,
    ]  # fmt: skip
    assert "32 from cache, 40 prefilled" in closer and "advantage -0.250" in closer and "reward 0.900" in closer
    first, second = closer.split('class="turn"')[1:]
    assert "advantage +0.500" in first and "advantage" not in second
    assert ">wrong<" in closer and ">right<" in plain
    assert "image_not_found" in gone and "no such file" in gone


@pytest.mark.parametrize(
    ("fragment", "names"),
    [
        ("#views=yes", ["closer"]),
        ("#views=no", ["plain", "gone"]),
        ("#verdict=wrong", ["closer"]),
        ("#status=rejected", ["gone"]),
        ("#q=RED+what", ["plain", "closer"]),
        ("#order=visual", ["closer", "plain", "gone"]),
        ("#q=nothing+like+it", []),
    ],
)
def test_filters(
    make_page: Callable[..., Path], browse: Callable[..., str], two_turn_rows: list, fragment: str, names: list[str]
) -> None:
    dom = browse(make_page(two_turn_rows), fragment)
    assert re.findall(r'<span class="id">(\w+)</span>', dom) == names
    assert count(dom) == ("3 rows" if len(names) == 3 else f"{len(names)} of 3 rows")


def hostile_row(two_turn_rows: list[dict[str, Any]]) -> dict[str, Any]:
    row = two_turn_rows[1] | {
        "id": HOSTILE,
        "question": HOSTILE,
        "answer": HOSTILE,
        "expected": [HOSTILE],
        "status": HOSTILE,
    }
    row |= {"error": {"code": HOSTILE, "message": HOSTILE}, HOSTILE: HOSTILE, "image_path": HOSTILE}
    fields = {
        "text": f"<think>{HOSTILE}</think><answer>{HOSTILE}</answer>{HOSTILE}",
        "finish": HOSTILE,
        "action": HOSTILE,
    }
    return row | {"turns": [turn | fields for turn in row["turns"]]}


def test_hostile_text_stays_text(
    make_page: Callable[..., Path], browse: Callable[..., str], two_turn_rows: list
) -> None:
    dom = browse(make_page([hostile_row(two_turn_rows), two_turn_rows[0]]))
    shown = "".join(articles(dom))
    assert count(dom) == "2 rows" and len(articles(dom)) == 2
    assert re.search(r"<title>([^<]*)</title>", dom)[1] == "out.jsonl · vtengine"  # type: ignore[index]
    assert "&lt;/script&gt;" in shown
    assert not re.search(r"<(script|svg onload|b on)|<img(?! src=\"data:image/webp)", shown)


def test_odd_rows_do_not_break_the_page(
    make_page: Callable[..., Path], browse: Callable[..., str], two_turn_rows: list
) -> None:
    odd: list[Any] = [None, 5, "x", [1], {"a": 1}, [None, 5, {"text": 3, "images": [None, 1, {}]}], True, -1, 1e300]
    keys = (
        "turns",
        "id",
        "answer",
        "expected",
        "error",
        "latency_s",
        "reward",
        "visual_tokens_full",
        "question",
        "status",
    )
    rows = [two_turn_rows[0] | {key: value} for key in keys for value in odd]
    dom = browse(make_page([*rows, two_turn_rows[1]]), "#q=closer")
    assert count(dom) == f"1 of {len(rows) + 1} rows"
    assert count(browse(make_page(rows), "#order=reward")) == f"{len(rows)} rows"


def test_large_runs_are_paged(make_page: Callable[..., Path], browse: Callable[..., str], two_turn_rows: list) -> None:
    rows = [two_turn_rows[0] | {"id": f"row{number}"} for number in range(1500)]
    page = make_page(rows)
    dom = browse(page)
    assert count(dom) == "1,500 rows" and 24 <= len(articles(dom)) < 200
    assert [count(browse(page, "#q=row1234"))] == ["1 of 1,500 rows"]


def test_screenshots_in_light_and_narrow(
    make_page: Callable[..., Path], browse: Callable[..., str], two_turn_rows: list, tmp_path: Path
) -> None:
    page = make_page(two_turn_rows)
    for size in ("1320,1500", "500,1200"):
        browse(page, screenshot=tmp_path / "shot.png", size=size)
        shot = Image.open(tmp_path / "shot.png").convert("RGB")
        assert f"{shot.width},{shot.height}" == size
        colours = shot.getcolors(2**24)
        assert colours is not None and len(colours) > 50
        assert any(red > 180 and green < 80 and blue < 80 for _, (red, green, blue) in colours), (
            "the picture is missing"
        )
