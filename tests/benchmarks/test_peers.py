"""What stands between the suites and their peers: placeholders, the load generator, the GPU script without a GPU."""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.engine.tiny import PAD, image, prompt
from tests.server.running import MODEL, ask, byte_tokenizer, make_setting, running, two_turns
from vtengine.engine.base import Request
from vtengine.engine.scripted import ScriptedBackend
from vtengine.engine.sglang import ServedModel
from vtengine.engine.sglang.pixels import PngCache
from vtengine.rollout.tokenizer import Tokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_sglang  # noqa: E402
from child import answer_of  # noqa: E402
from load_client import content  # noqa: E402
from peer_backend import Started, base64_png, collapsed  # noqa: E402


@pytest.mark.parametrize("count", [0, 1, 3])
def test_one_placeholder_per_image(count: int) -> None:
    pictures = tuple(image(seed, h=4, w=2 * seed + 2) for seed in range(1, count + 1))
    ids = prompt(0, 20, pictures)
    short = collapsed(ids, PAD, pictures)
    assert short.count(PAD) == count
    sizes = iter([picture.visual_tokens for picture in pictures])
    again = [token for one in short for token in ([one] * next(sizes) if one == PAD else [one])]
    assert again == list(ids)


def test_pixels_travel_without_loss() -> None:
    picture = image(3, h=6, w=4)
    sent = Image.open(io.BytesIO(base64.b64decode(base64_png(PngCache(1 << 20), picture, "r"))))
    assert sent.size == (picture.width, picture.height)


def test_memory_of_a_group_of_processes() -> None:
    line = [
        sys.executable,
        "-c",
        "x = bytearray(64 << 20); x[::4096] = b'1' * len(x[::4096]); print(1, flush=True); input()",
    ]
    process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None and process.stdin is not None
    process.stdout.readline()
    assert 64 < Started(process.pid, 0.0).peak_mib() < 512
    process.stdin.close()
    process.wait(10)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os; os.kill(os.getpid(), 15)", "the side was killed by signal 15"),
        ("raise SystemExit('no room')", "the side ended with status 1: no room"),
        ("print('so far')", "the side ended with status 0, but said 'so far' instead of a JSON object"),
        ("", "the side ended with status 0, but said '' instead"),
    ],
    ids=["killed", "failed", "no JSON", "nothing"],
)
def test_a_child_that_gives_no_answer_is_named_with_its_end(program: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        answer_of("the side", [sys.executable, "-c", program])


def test_the_answer_of_a_child_is_its_last_line() -> None:
    program = "import os; print('warning'); print('{\"seconds\": ' + os.environ['SECONDS_SPENT'] + '}')"
    assert answer_of("the side", [sys.executable, "-c", program], {"SECONDS_SPENT": "2"}) == {"seconds": 2}


@pytest.mark.parametrize("stream", [False, True])
def test_the_load_generator_reads_every_reply(stream: bool, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    body = json.dumps({"model": MODEL, "messages": ask(), "stream": stream})
    (tmp_path / "requests.jsonl").write_text(f"{body}\n" * 5)
    with running(make_setting(ScriptedBackend(tokenizer, two_turns), tokenizer)) as server:
        line = [sys.executable, str(BENCHMARKS / "load_client.py"), server.url, str(tmp_path / "requests.jsonl")]
        done = subprocess.run([*line, "--concurrency", "2"], input="\n", capture_output=True, text=True, timeout=60)
    ready, report = done.stdout.splitlines()
    made = json.loads(report)
    assert ready == "ready" and made["contents"] == ["a red ball"] * 5 and made["failed"] == []
    assert all(0 < first <= last for first, last in zip(made["first_s"], made["last_s"], strict=True))


def test_an_answer_of_a_whole_reply_and_of_a_stream() -> None:
    assert content(b'{"choices": [{"message": {"content": "a"}}]}') == "a"
    event = b'data: {"choices": [{"delta": {"content": "b"}}]}\n\n'
    assert content(event + b'data: {"choices": []}\n\n' + event + b"data: [DONE]\n\n") == "bb"


def test_the_gpu_script_says_what_it_skips(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_sglang.main([]) == 0
    assert "no CUDA device seen by torch. Skipped: two turns through SGLang" in capsys.readouterr().out


@pytest.mark.parametrize("tiny", [False, True])
def test_the_gpu_script_writes_a_model_that_can_be_read(tiny: bool, tmp_path: Path) -> None:
    gpu_sglang.write_model(tmp_path, None, tiny)
    served, tokenizer = ServedModel.from_folder(tmp_path), Tokenizer.load(tmp_path)
    assert served.image_token_id == tokenizer.image_pad_id
    assert served.vocab_size == (512 if tiny else 152064)


def test_the_gpu_script_leaves_the_kernels_to_sglang_unless_one_is_named() -> None:
    for named, wanted in (([], None), (["triton"], "triton_attn"), (["fa3"], "fa3")):
        args = gpu_sglang.parser().parse_args(["--side", "on", *(["--attention-backend", *named] if named else [])])
        assert gpu_sglang.engine_arguments(args, True).get("mm_attention_backend") == wanted


def test_the_gpu_script_asks_two_turns_of_siblings(tmp_path: Path) -> None:
    gpu_sglang.write_model(tmp_path, None, True)
    config = json.loads((tmp_path / "config.json").read_text())
    backend: Any = ScriptedBackend(
        Tokenizer.load(tmp_path), lambda request: "ab", image_token_id=config["image_token_id"]
    )
    load = gpu_sglang.Load(backend, config, argparse.Namespace(dry_run=True))
    first, second, seconds = asyncio.run(load.two_turns(0, 2))
    asked: list[Request] = backend.requests
    assert len(first) == len(second) == 4 and len(seconds) == 2 and all(one > 0 for one in seconds)
    for before, after, reply in zip(asked[:4], asked[4:], first, strict=True):
        assert after.token_ids[: len(before.token_ids) + len(reply.token_ids)] == before.token_ids + reply.token_ids
        assert [picture.visual_tokens for picture in after.images] == [16, 64]
        assert after.token_ids.count(config["image_token_id"]) == 80
    assert asked[0].token_ids == asked[1].token_ids != asked[2].token_ids
    assert sum(one.cached_tokens for one in second) > 0


VLLM = BENCHMARKS.parent / ".venv-vllm" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not VLLM.is_file(), reason="needs make vllm-venv")
def test_vllm_loads_the_shipped_checkpoint_and_answers() -> None:
    from peer_backend import VllmBackend
    from two_turn_run import held_out_questions, model_folder, run_once

    from vtengine.cli.models import shipped_model

    os.environ.pop("VTENGINE_BENCH_MODEL", None)
    folder = model_folder()
    assert folder == Path(shipped_model())
    backend = VllmBackend(folder, Tokenizer.load(folder).image_pad_id, prefix_cache=True)
    try:
        done = run_once(folder, lambda _: backend, held_out_questions(2), 2, ask_one_in=1)
    finally:
        backend.stop()
    episodes = [sample.episode for sample in done.samples]
    assert [len(episode.turns) for episode in episodes] == [2, 2] and not any(one.error for one in episodes)
