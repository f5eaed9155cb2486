"""Columns in, columns out, on the shipped model; `map_batches` of Ray Data calls nothing else."""

from __future__ import annotations

import asyncio
import io
import json
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vtengine.batch import ANSWERS, AnswerBatches
from vtengine.cli.errors import CliError
from vtengine.cli.models import shipped_model

REPO = Path(__file__).resolve().parents[1]
EXAMPLES = REPO / "examples" / "glance"


class Dataset:
    """The part of ray.data.Dataset that the recipe uses: one actor, batches of columns as NumPy arrays."""

    def __init__(self, rows):
        self.rows = rows

    def map_batches(self, stage, *, fn_constructor_kwargs, batch_size, **_):
        actor, found = stage(**fn_constructor_kwargs), []
        for start in range(0, len(self.rows), batch_size):
            part = self.rows[start : start + batch_size]
            columns = {name: np.array([row[name] for row in part], dtype=object) for name in part[0]}
            answered = actor(columns)
            found += [{name: answered[name][k] for name in answered} for k in range(len(part))]
        actor.close()
        return Dataset(found)


@pytest.mark.skipif(not (shipped_model() / "model.safetensors").is_file(), reason="the shipped model is not here")
def test_answers_come_in_order_and_a_bad_row_ends_nothing():
    lines = (EXAMPLES / "questions.jsonl").read_text().splitlines()[:3]
    rows = [{name: json.loads(line)[name] for name in ("id", "image", "question", "answer")} for line in lines]
    rows[1]["image"] = (EXAMPLES / rows[1]["image"]).read_bytes()
    bad = {"id": "bad", "image": "no-such.png", "question": "?", "answer": ""}
    wrong = {"id": "wrong", "image": 7, "question": "?", "answer": ""}
    null = {"id": "null", "image": {"bytes": None, "path": None}, "question": "?", "answer": ""}
    text = {"id": "text", "image": None, "question": "What number is written?", "answer": ""}
    options = {"model": "glance", "image_root": str(EXAMPLES), "concurrency": 4, "max_new_tokens": 48}
    answers = Dataset([rows[0], bad, rows[1], wrong, rows[2], null, text]).map_batches(
        AnswerBatches, fn_constructor_kwargs=options, batch_size=4
    )
    ids = [rows[0]["id"], "bad", rows[1]["id"], "wrong", rows[2]["id"], "null", "text"]
    assert [row["id"] for row in answers.rows] == ids
    statuses = [row["status"] for row in answers.rows]
    assert [statuses[k] for k in (1, 3, 5)] == ["rejected"] * 3 and "rejected" not in statuses[::2]
    assert all("input_wrong_type" in answers.rows[k]["error"] for k in (3, 5))
    assert [row["expected"] for row in answers.rows[:5:2]] == [row["answer"] for row in rows]
    assert answers.rows[6]["visual_tokens"] == answers.rows[6]["visual_tokens_full"] == 0
    for row in answers.rows:
        assert set(ANSWERS) <= set(row) and json.loads(row["row"])["status"] == row["status"]
        assert row["answer"] == json.loads(row["row"])["answer"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 4}, "--n"),  # a batch has one answer for each row
        ({"resolution": "medium"}, "invalid choice: 'medium'"),
        ({"temperature": -1}, "'-1' is not a number >= 0"),
        ({"backend": "nope"}, "--backend nope"),
        ({"model": "no/such/folder"}, "no/such/folder"),
        ({"image_root": "no/such/folder"}, "image_root = 'no/such/folder': is not a folder"),
        ({"concurrency": 0}, "concurrency = 0: must be >= 1"),
        ({"engine_arg": ["tp_size=2", "page_size=1"]}, "--engine-arg tp_size=2: is for --backend sglang"),
    ],
)
def test_options_that_there_are_not(options, message):
    with pytest.raises((ValueError, CliError), match=message):
        AnswerBatches(**{"model": "glance"} | options)


def test_the_page_for_python_programs(monkeypatch, capsys):
    """The blocks of docs/python.md run as they stand, in the root of a checkout."""
    monkeypatch.chdir(REPO)
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "python.md").read_text(), re.DOTALL)
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), {})
    said = capsys.readouterr().out
    assert len(blocks) == 2 and "189 answered" in said and "torch.Size([24, 1176])" in said


def test_what_is_missing_is_named():
    stage = AnswerBatches.__new__(AnswerBatches)
    with pytest.raises(ValueError, match="no column question; it has id, image"):
        stage({"image": [], "id": []})
    with pytest.raises(ValueError, match=r"differ in length: \{'image': 1, 'question': 2\}"):
        stage({"image": ["x.png"], "question": ["a", "b"]})


@pytest.mark.skipif(not (shipped_model() / "model.safetensors").is_file(), reason="the shipped model is not here")
def test_in_a_notebook_as_from_threads():
    """A notebook's cell runs inside of an event loop."""
    ask = {"image": ["images/test-0-00001.png"] * 2, "question": ["What number is written?"] * 2}

    async def cell():
        options = {"image_root": str(EXAMPLES), "max_new_tokens": 48}
        with AnswerBatches("glance", **options) as stage, ThreadPoolExecutor(4) as threads:
            return stage, [stage(ask), *threads.map(stage, [ask] * 4)]

    stage, found = asyncio.run(cell())
    assert [answers["answer"] for answers in found] == [["189", "189"]] * 5
    assert "vtengine-batches" not in [thread.name for thread in threading.enumerate()]
    stage.close()
    with pytest.raises(RuntimeError, match="is closed"):
        stage(ask)


@pytest.mark.parametrize("notebook", [False, True])
def test_ctrl_c_while_it_opens_leaves_nothing_behind(monkeypatch, notebook):
    """As while a server is asked which model it has: the engine is closed before the call ends."""
    ended = []

    @asynccontextmanager
    async def slow_session(*_):
        asyncio.get_running_loop().call_later(0.05, signal.pthread_kill, threading.main_thread().ident, signal.SIGINT)
        try:
            await asyncio.sleep(20)
            yield
        finally:
            await asyncio.sleep(0.01)
            ended.append(True)

    async def cell():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            AnswerBatches("glance")

    monkeypatch.setattr("vtengine.batch.open_session", slow_session)
    if notebook:
        asyncio.run(cell())
    else:
        with pytest.raises(KeyboardInterrupt):
            AnswerBatches("glance")
    assert ended and "vtengine-batches" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.skipif(not (shipped_model() / "model.safetensors").is_file(), reason="the shipped model is not here")
def test_a_forked_process_is_told_instead_of_left_waiting():
    program = (
        "import os, torch\n"
        "from vtengine.batch import AnswerBatches\n"
        "torch.set_num_threads(2)\n"
        "stage = AnswerBatches('glance')\n"
        "if os.fork() == 0:\n"
        "    for use in (lambda: stage({'image': [], 'question': []}), lambda: AnswerBatches('glance')):\n"
        "        try: use()\n"
        "        except RuntimeError as error: print(error, flush=True)\n"
        "    os._exit(0)\n"
        "os.wait(); stage.close()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    of_old, of_new = done.stdout.splitlines()
    assert "make one in each process" in of_old and "multiprocessing's spawn" in of_new


@pytest.mark.skipif(not (shipped_model() / "model.safetensors").is_file(), reason="the shipped model is not here")
def test_images_as_datasets_have_them():
    path = EXAMPLES / "images/test-0-00001.png"
    opened, cut = Image.open(path), Image.open(io.BytesIO(path.read_bytes()[:300]))
    turned = opened.convert("RGB").transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be turned back
    images = [opened, opened.convert("CMYK"), turned, {"bytes": path.read_bytes(), "path": None}, cut]
    images.append({"bytes": None, "path": "images/test-0-00001.png"})
    gray = np.asarray(opened.convert("L"))
    images.append(Image.frombytes("I;16B", opened.size, (gray.astype(">u2") * 257).tobytes()))  # of a TIFF file
    images.append(Image.fromarray(gray.astype(np.float32) / 255))  # Pillow's own conversion makes it black
    with AnswerBatches("glance", image_root=str(EXAMPLES), max_new_tokens=48) as stage:
        found = stage({"image": images, "question": ["What number is written?"] * len(images)})
    assert found["answer"] == ["189"] * 4 + [None, "189", "189", None]
    assert "image_corrupt" in found["error"][4] and "32-bit pixels" in found["error"][7]


@pytest.mark.skipif(not (shipped_model() / "model.safetensors").is_file(), reason="the shipped model is not here")
def test_a_program_that_does_not_close_it_ends_in_order():
    """Python ends a daemon's thread wherever it is, and inside of torch that aborts the process, now and then."""
    program = (
        "import atexit, threading\n"
        "from vtengine.batch import AnswerBatches\n"
        "stage = AnswerBatches('glance')\n"
        "names = lambda: [thread.name for thread in threading.enumerate()].count('vtengine-engine')\n"
        "before = names(); atexit._run_exitfuncs(); print(before, names())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "1 0\n"
