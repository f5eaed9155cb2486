"""`vtengine generate` on scripted replies: rows, order, statuses, images of every bad kind."""

from __future__ import annotations

import io
import json
import re
import struct
import threading
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vtengine.vision import http_source

Run = Callable[..., Any]
ROW_KEYS = (
    *("id", "sample", "status", "error", "answer", "upscaled", "turns"),
    *("visual_tokens", "visual_tokens_full", "latency_s", "logprob_sum"),
)
TURN_KEYS = (
    *("text", "finish", "action", "prompt_tokens", "cached_tokens", "prefill_tokens", "completion_tokens"),
    *("images", "latency_s", "ttft_s"),
)


def test_rows_follow_the_contract(vtengine: Run, scripted: Run, questions: Run, rows_of: Run, tmp_path: Path) -> None:
    done = vtengine("generate", questions(9), "-o", tmp_path / "out.jsonl", *scripted())
    rows = rows_of(tmp_path / "out.jsonl")
    assert done.status == 0, done.err
    assert [row["id"] for row in rows] == [f"q{number}" for number in range(9)]
    for row in rows:
        assert tuple(row)[: len(ROW_KEYS)] == ROW_KEYS
        assert (row["sample"], row["error"] is None) == (0, row["status"] == "answered")
        assert row["question"] == f"{row['k']} is which?" and row["expected"] == ["blue"]
        assert row["correct"] == (row["answer"] == "blue")
        assert row["upscaled"] == (len(row["turns"]) == 2)
        assert (tmp_path / row["image_path"]).is_file()
        for turn in row["turns"]:
            assert tuple(turn) == TURN_KEYS
            assert turn["cached_tokens"] + turn["prefill_tokens"] == turn["prompt_tokens"]
    assert {row["status"] for row in rows} == {"answered", "malformed"}
    assert any(row["upscaled"] and row["turns"][1]["cached_tokens"] > 0 for row in rows)


def test_summary_is_printed(vtengine: Run, scripted: Run, questions: Run, tmp_path: Path) -> None:
    done = vtengine("generate", questions(9), "-o", tmp_path / "out.jsonl", *scripted())
    for name in ("accuracy", "upscale ratio", "against always-high", "resumed from the cache", "throughput"):
        assert name in done.out
    assert vtengine("generate", questions(2), "-o", tmp_path / "q.jsonl", *scripted(), "--quiet").out == ""


def test_rows_that_could_not_be_asked_are_neither_right_nor_wrong(
    vtengine: Run, scripted: Run, questions: Run, rows_of: Run, tmp_path: Path
) -> None:
    """An image that is not there, and a line that is no question. The accuracy leaves out the row with an answer."""
    path = questions(
        4, {"image": "gone.png", "question": "?", "answer": "b"}, {"image": "", "question": "?", "answer": "b"}
    )
    replies = [["<think>a</think><answer>blue</answer>"]]
    done = vtengine("generate", path, "-o", tmp_path / "out.jsonl", *scripted(0, replies))
    assert done.status == 3
    assert ["correct" in row for row in rows_of(tmp_path / "out.jsonl")] == [True] * 4 + [False] * 2
    assert re.search(r"accuracy +100.0%  \(4 of 4 with an answer; 1 rejected or failed left out\)\n", done.out)


def test_samples_follow_their_question(
    vtengine: Run, scripted: Run, questions: Run, rows_of: Run, tmp_path: Path
) -> None:
    path = questions(3, b"half a li")
    done = vtengine("generate", path, "-o", tmp_path / "out.jsonl", *scripted(), "--n", 3, "--temperature", 1)
    assert done.status == 3
    places = [(row["id"], row["sample"]) for row in rows_of(tmp_path / "out.jsonl")]
    assert places == [(name, sample) for name in ("q0", "q1", "q2", "line-4") for sample in range(3)]


@pytest.mark.parametrize("concurrency", [1, 3, 64])
def test_order_is_kept(
    vtengine: Run, scripted: Run, questions: Run, without_times: Run, tmp_path: Path, concurrency: int
) -> None:
    path = questions(30)
    vtengine("generate", path, "-o", tmp_path / "a.jsonl", *scripted(0.002), "--concurrency", concurrency)
    vtengine("generate", path, "-o", tmp_path / "b.jsonl", *scripted(), "--concurrency", 1)
    assert without_times(tmp_path / "a.jsonl") == without_times(tmp_path / "b.jsonl")


def test_one_view_only(vtengine: Run, scripted: Run, questions: Run, rows_of: Run, tmp_path: Path) -> None:
    flags = scripted(0, [["<think>x</think><answer>blue</answer>"]])
    for resolution in ("low", "high"):
        assert (
            vtengine(
                "generate", questions(3), "-o", tmp_path / f"{resolution}.jsonl", *flags, "--resolution", resolution
            ).status
            == 0
        )
    low, high = rows_of(tmp_path / "low.jsonl"), rows_of(tmp_path / "high.jsonl")
    assert all(row["visual_tokens"] < row["visual_tokens_full"] for row in low)
    assert all(row["visual_tokens"] == row["visual_tokens_full"] and not row["upscaled"] for row in high)


def png_header(width: int, height: int) -> bytes:
    data = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", data), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("missing.png", None, "image_not_found"),
        ("folder", "folder", "image_is_directory"),
        ("empty.png", b"", "image_empty"),
        ("text.png", b"this is no picture\n", "image_unsupported_format"),
        ("cut.jpg", encoded(Image.effect_noise((200, 200), 50).convert("RGB"), "JPEG")[:-900], "image_truncated"),
        ("bomb.png", png_header(60_000, 60_000), "image_too_many_pixels"),
        ("long.png", encoded(Image.new("RGB", (6000, 20)), "PNG"), "image_aspect_ratio"),
        ("nul\0.png", None, "image_not_found"),
        ("../outside.png", encoded(Image.new("RGB", (30, 30)), "PNG"), "image_outside_root"),
        ("/etc/hostname", None, "image_outside_root"),
        ("https://example.org/a.png", None, "image_url_not_allowed"),
        ("file:///etc/hostname", None, "image_url_not_allowed"),
        ("data:image/png;base64,@@@", None, "image_corrupt"),
    ],
)
def test_bad_image_becomes_a_row_and_the_run_goes_on(
    vtengine: Run, scripted: Run, questions: Run, rows_of: Run, tmp_path: Path, name: str, content: Any, code: str
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    if content == "folder":
        (folder / name).mkdir()
    elif content is not None:
        (folder / name).write_bytes(content)
    bad = {"id": "bad", "image": name, "question": "What?", "answer": "x", "note": [1]}
    questions(2)
    lines = [bad, {"id": "good", "image": "p0.png", "question": "What?"}]
    (tmp_path / "p0.png").rename(folder / "p0.png")
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = vtengine(
        "generate",
        folder / "in.jsonl",
        "-o",
        tmp_path / "out.jsonl",
        *scripted(0, [["<think>a</think><answer>b</answer>"]]),
    )
    rejected, good = rows_of(tmp_path / "out.jsonl")
    assert done.status == 3
    assert (rejected["status"], rejected["error"]["code"], rejected["turns"]) == ("rejected", code, [])
    assert rejected["error"]["message"] and rejected["note"] == [1] and rejected["expected"] == ["x"]
    assert "correct" not in rejected
    assert good["status"] == "answered"


@pytest.mark.parametrize("kind", ["one pixel", "animated"])
def test_odd_but_good_images(vtengine: Run, scripted: Run, rows_of: Run, tmp_path: Path, kind: str) -> None:
    if kind == "one pixel":
        data = encoded(Image.new("RGB", (1, 1), "red"), "PNG")
    else:
        frames = [Image.new("RGB", (60, 40), colour) for colour in ("red", "blue", "green")]
        data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    (tmp_path / "image").write_bytes(data)
    (tmp_path / "in.jsonl").write_text('{"image": "image", "question": "What colour?"}\n')
    done = vtengine("generate", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", *scripted())
    assert done.status == 0, done.err
    assert rows_of(tmp_path / "out.jsonl")[0]["visual_tokens"] >= 1


def test_bad_lines_become_rows_in_their_place(
    vtengine: Run, scripted: Run, questions: Run, rows_of: Run, tmp_path: Path
) -> None:
    extra = (b"\xff\xfe", b'{"id": "h", "image": ', b"[]", {"id": "q1", "image": "p1.png", "question": "again"})
    more = ({"image": "p0.png"}, {"image": 7, "question": "q"}, {"id": {}, "image": "p0.png", "question": "q"})
    done = vtengine("generate", questions(2, *extra, *more), "-o", tmp_path / "out.jsonl", *scripted())
    assert "1 line_not_utf8" in done.out
    codes = [row["error"]["code"] for row in rows_of(tmp_path / "out.jsonl") if row["status"] == "rejected"]
    assert done.status == 3
    assert codes == [
        *("line_not_utf8", "line_not_json", "line_not_object", "id_duplicate"),
        *("question_missing", "image_wrong_type", "id_wrong_type"),
    ]


def test_images_from_a_host_that_fails_for_a_while(
    vtengine: Run, scripted: Run, rows_of: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a row fails, and --resume tries it again; one whose image is not there is rejected for good."""
    asked: list[str] = []

    class Images(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response({"/good.png": 200, "/busy.png": 503 if is_busy else 200}.get(self.path, 404))
            self.end_headers()
            self.wfile.write(encoded(Image.new("RGB", (60, 40), "red"), "PNG"))

        def log_message(self, *_: object) -> None: ...

    is_busy = True
    monkeypatch.setattr(http_source, "PAUSES_S", (0.01, 0.01))
    with ThreadingHTTPServer(("127.0.0.1", 0), Images) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_port}"
        rows = [{"id": name, "image": f"{host}/{name}.png", "question": "?"} for name in ("good", "busy", "gone")]
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        line = ["generate", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", *scripted(0, [["<answer>b</answer>"]])]
        assert vtengine(*line, "--allow-http").status == 3
        refused = [row["error"]["message"] for row in rows_of(tmp_path / "out.jsonl")]
        assert all("only with --allow-private-hosts" in message for message in refused) and not asked
        line += ["--allow-http", "--allow-private-hosts"]
        assert vtengine(*line).status == 3
        assert [row["status"] for row in rows_of(tmp_path / "out.jsonl")] == ["answered", "failed", "rejected"]
        is_busy = False
        asked.clear()
        assert vtengine(*line, "--resume").status == 3
        server.shutdown()
    assert [row["status"] for row in rows_of(tmp_path / "out.jsonl")] == ["answered", "answered", "rejected"]
    assert asked == ["/busy.png"]


def test_an_engine_that_breaks_fails_its_row_only(
    vtengine: Run, scripted: Run, questions: Run, rows_of: Run, tmp_path: Path
) -> None:
    done = vtengine(
        "generate",
        questions(12),
        "-o",
        tmp_path / "out.jsonl",
        *scripted(0, [["<think>a</think><answer>b</answer>"], [7]]),
    )
    statuses = [row["status"] for row in rows_of(tmp_path / "out.jsonl")]
    assert done.status == 3 and set(statuses) == {"answered", "failed"}
    assert f"{statuses.count('failed')} failed: run the same command with --resume" in done.err


def test_an_empty_input_gives_an_empty_output(vtengine: Run, scripted: Run, questions: Run, tmp_path: Path) -> None:
    done = vtengine("generate", questions(0), "-o", tmp_path / "out.jsonl", *scripted())
    assert done.status == 0 and (tmp_path / "out.jsonl").read_bytes() == b"" and "()" not in done.out


def test_image_root_widens_and_narrows(
    vtengine: Run, scripted: Run, questions: Run, rows_of: Run, tmp_path: Path
) -> None:
    questions(1)
    folder = tmp_path / "deep"
    folder.mkdir()
    (folder / "in.jsonl").write_text('{"image": "../p0.png", "question": "q"}\n')
    assert vtengine("generate", folder / "in.jsonl", "-o", tmp_path / "a.jsonl", *scripted()).status == 3
    flags = ["--image-root", tmp_path]
    assert vtengine("generate", folder / "in.jsonl", "-o", tmp_path / "b.jsonl", *scripted(), *flags).status == 0
    assert rows_of(tmp_path / "b.jsonl")[0]["image_path"] == "p0.png"


def test_the_page_shows_the_run(vtengine: Run, scripted: Run, questions: Run, tmp_path: Path) -> None:
    vtengine("generate", questions(4, b"{"), "-o", tmp_path / "out.jsonl", *scripted())
    done = vtengine("view", tmp_path / "out.jsonl", "-o", tmp_path / "out.html")
    assert done.status == 0 and "5 rows" in done.out
    assert (tmp_path / "out.html").read_text().count("data:image/webp;base64,") == 8


def test_rows_without_an_image(vtengine: Run, scripted: Run, questions: Run, rows_of: Run, tmp_path: Path) -> None:
    """They have one turn, and no share in figures about images; the page and a resumed run take them as they are."""
    call = '<tool_call>{"name": "resize_image", "arguments": {"action": "resize"}}</tool_call>'
    flags = scripted(scripts=[[call, "<answer>blue</answer>"]], text="<think>b</think><answer>4</answer>")
    text, null = {"id": "t", "question": "2 + 2?", "answer": 4, "k": 9}, {"id": "u", "image": None, "question": "?"}
    mixed = questions(2, text, null)
    done = vtengine("generate", mixed, "-o", tmp_path / "out.jsonl", *flags)
    assert done.status == 0, done.err
    *images, text, null = rows_of(tmp_path / "out.jsonl")
    assert (text["answer"], text["correct"], text["k"], text["upscaled"]) == ("4", True, 9, False)
    assert (text["visual_tokens"], text["visual_tokens_full"], len(text["turns"])) == (0, 0, 1)
    assert text["turns"][0]["images"] == [] and "image_path" not in text and "image" not in text
    assert null["status"] == "answered" and null["image"] is None
    assert all(row["upscaled"] for row in images) and "100.0%  (2 asked for more pixels)" in done.out
    assert vtengine("view", tmp_path / "out.jsonl", "-o", tmp_path / "out.html").status == 0
    assert vtengine("generate", mixed, "-o", tmp_path / "out.jsonl", *flags, "--resume").status == 0
    assert rows_of(tmp_path / "out.jsonl") == [*images, text, null]


def test_a_run_without_any_image(vtengine: Run, scripted: Run, questions: Run, tmp_path: Path) -> None:
    done = vtengine("generate", questions(0, {"question": "2 + 2?"}), "-o", tmp_path / "out.jsonl", *scripted(text="4"))
    assert done.status == 0 and "1 malformed" in done.out
    assert "upscale ratio" not in done.out and "always-high" not in done.out
