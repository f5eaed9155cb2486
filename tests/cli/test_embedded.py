"""The whole command on the embedded engine, with a tiny random model: wiring, broken checkpoints, resumption."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vtengine.cli import engine
from vtengine.cli.engine import EngineSetup
from vtengine.engine.embedded.runner import Runner

Run = Callable[..., Any]


def flags(checkpoint: Path) -> list[str]:
    return ["--model", str(checkpoint), "--max-new-tokens", "6"]


def test_generate(checkpoint: Path, vtengine: Run, questions: Run, rows_of: Run, tmp_path: Path) -> None:
    done = vtengine("generate", questions(8), "-o", tmp_path / "out.jsonl", *flags(checkpoint))
    rows = rows_of(tmp_path / "out.jsonl")
    assert done.status == 0, done.err
    assert {row["status"] for row in rows} <= {"malformed", "truncated"}
    for row in rows:
        (turn,) = row["turns"]
        assert turn["cached_tokens"] + turn["prefill_tokens"] == turn["prompt_tokens"]
        assert turn["images"][0]["encoded"] and 1 <= turn["completion_tokens"] <= 6
        assert turn["cached_tokens"] >= 32, "the shared prompt was not in the cache"


def test_generate_on_several_engines(
    checkpoint: Path, vtengine: Run, questions: Run, rows_of: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows as one engine writes, but for times; the shared prompt is known to each engine."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found = []
    for name, more in (("one", []), ("two", ["--data-parallel", 2])):
        path = tmp_path / f"{name}.jsonl"
        done = vtengine("generate", questions(6), "-o", path, *flags(checkpoint), *more)
        assert done.status == 0, done.err
        rows = rows_of(path)
        assert all(turn["cached_tokens"] >= 32 for row in rows for turn in row["turns"])
        found.append([(row["id"], row["status"], [turn["text"] for turn in row["turns"]]) for row in rows])
    assert found[0] == found[1]


def test_a_checkpoint_that_no_process_can_load_is_one_line(
    checkpoint: Path, vtengine: Run, questions: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    line = ["generate", questions(1), "-o", tmp_path / "out.jsonl", *flags(folder), "--data-parallel", 2]
    done = vtengine(*line)
    assert done.status == 2 and done.err.count("\n") == 1 and "model.safetensors" in done.err


def test_no_process_is_started_for_a_folder_that_cannot_be_used(
    checkpoint: Path, vtengine: Run, questions: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would load on after the command has ended."""
    started: list[Any] = []
    monkeypatch.setattr("vtengine.cli.session.start_engines", lambda *arguments: started.append(arguments))
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    (folder / "preprocessor_config.json").write_text('{"patch_size": 15}')
    line = ["generate", questions(1), "-o", tmp_path / "out.jsonl", *flags(folder), "--data-parallel", 2]
    done = vtengine(*line)
    assert done.status == 2 and "patch_size = 15" in done.err
    assert not started


@pytest.mark.parametrize("engines", [0, 2])
def test_a_pool_that_holds_no_question_is_refused_and_the_least_named_that_does(
    checkpoint: Path, vtengine: Run, questions: Run, rows_of: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    engines: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    out = tmp_path / "out.jsonl"
    line = ["generate", questions(2), "-o", out, *flags(checkpoint), "--data-parallel", engines, "--kv-gb"]
    done = vtengine(*line, "0.00001")
    assert done.status == 2 and done.err.count("\n") == 1 and "--kv-gb 1e-05: holds no question at all" in done.err
    assert not out.exists()
    least = re.search(r"give --kv-gb (\S+) or more", done.err)[1]  # type: ignore[index]
    assert vtengine(*line, float(least) - 1e-5).status == 2
    assert vtengine(*line, least).status in (0, 3) and rows_of(out)


def test_replies_end_with_the_context_so_the_pool_need_not_hold_more(
    checkpoint: Path, vtengine: Run, questions: Run, rows_of: Run, tmp_path: Path
) -> None:
    folder, out = tmp_path / "short", tmp_path / "out.jsonl"
    shutil.copytree(checkpoint, folder)
    line = ["generate", questions(1), "-o", out, "--model", folder, "--max-new-tokens", 50_000]
    done = vtengine(*line)
    assert done.status == 2 and done.err.startswith("vtengine: the default of --kv-gb: holds no question at all")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    assert vtengine(*line).status in (0, 3)
    (row,) = rows_of(out)
    assert row["turns"][0]["prompt_tokens"] + row["turns"][0]["completion_tokens"] <= 128


def test_more_engines_than_cores_are_refused(checkpoint: Path, vtengine: Run, questions: Run, tmp_path: Path) -> None:
    line = ["generate", questions(1), "-o", tmp_path / "out.jsonl", *flags(checkpoint), "--data-parallel", 999]
    done = vtengine(*line)
    assert done.status == 2 and "--data-parallel 999: is more than the" in done.err


def test_several_engines_are_embedded_ones(vtengine: Run, questions: Run, tmp_path: Path) -> None:
    line = ["generate", questions(1), "-o", tmp_path / "out.jsonl", "--data-parallel", 2, "--backend", "http://x:1"]
    done = vtengine(*line)
    assert done.status == 2 and "--data-parallel 2: is for --backend embedded" in done.err


@pytest.mark.parametrize(("device", "expected"), [("cuda", [engine.SWITCH_INTERVAL_S]), ("cpu", [])])
def test_where_an_engine_launches_passes_on_a_gpu_other_threads_give_way_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, expected: list[float]
) -> None:
    found: list[float] = []
    monkeypatch.setattr(engine.sys, "setswitchinterval", found.append)
    with pytest.raises(ValueError, match="no such file"):
        EngineSetup(str(tmp_path), device, "float32", 1).load(None)  # type: ignore[arg-type]
    assert found == expected


@pytest.mark.parametrize("stated", [True, False])
def test_generate_with_qwen3_vl(
    qwen3_checkpoint: Path, vtengine: Run, questions: Run, rows_of: Run, tmp_path: Path, stated: bool
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(qwen3_checkpoint, folder)
    if not stated:
        (folder / "preprocessor_config.json").unlink()
    done = vtengine("generate", questions(3), "-o", tmp_path / "out.jsonl", *flags(folder))
    assert done.status == 0, done.err
    for row in rows_of(tmp_path / "out.jsonl"):
        assert row["visual_tokens_full"] >= 64, "the limits are those of Qwen3-VL"
        (shown,) = row["turns"][0]["images"]
        assert shown["width"] % 32 == shown["height"] % 32 == 0
        assert shown["visual_tokens"] == row["visual_tokens"] == shown["width"] * shown["height"] // 1024
    done = vtengine("view", tmp_path / "out.jsonl", "-o", tmp_path / "page.html")
    assert done.status == 0 and "data:image/webp" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_pixels_of_another_family_are_one_line(
    qwen3_checkpoint: Path, vtengine: Run, questions: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(qwen3_checkpoint, folder)
    (folder / "preprocessor_config.json").write_text('{"patch_size": 14}')
    done = vtengine("generate", questions(1), "-o", tmp_path / "out.jsonl", *flags(folder))
    assert done.status == 2 and done.err.count("\n") == 1 and "patch_size = 14: only 16" in done.err


@pytest.mark.parametrize("backend", ["http://127.0.0.1:9", "http://127.0.0.1:9,http://127.0.0.1:10"])
def test_sglang_does_not_get_the_other_family(
    qwen3_checkpoint: Path, vtengine: Run, questions: Run, tmp_path: Path, backend: str
) -> None:
    line = ["generate", questions(1), "-o", tmp_path / "out.jsonl", *flags(qwen3_checkpoint), "--backend", backend]
    done = vtengine(*line)
    assert done.status == 2 and done.err.count("\n") == 1
    assert "is a qwen3_vl; SGLang serves Qwen2.5-VL here: use embedded" in done.err


def test_samples_of_one_question_differ_and_repeat(
    checkpoint: Path, vtengine: Run, questions: Run, rows_of: Run, tmp_path: Path
) -> None:
    path = questions(3)
    for name in ("a", "b"):
        line = ["generate", path, "-o", tmp_path / name, *flags(checkpoint), "--n", "4", "--temperature", "1"]
        assert vtengine(*line, "--concurrency", "12" if name == "a" else "3").status == 0
    texts = [[row["turns"][0]["text"] for row in rows_of(tmp_path / name)] for name in ("a", "b")]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 3


def test_killed_and_resumed(
    checkpoint: Path, process: Run, vtengine: Run, questions: Run, without_times: Run, tmp_path: Path
) -> None:
    line = ["generate", questions(60), *flags(checkpoint), "--concurrency", "3", "--max-new-tokens", "24", "-o"]
    running = process(*line, tmp_path / "out.jsonl")
    running.wait_for_rows(tmp_path / "out.jsonl", 4)
    running.popen.kill()
    running.finish()
    assert (tmp_path / "out.jsonl").read_bytes().count(b"\n") < 60
    assert vtengine(*line, tmp_path / "out.jsonl", "--resume").status == 0
    assert vtengine(*line, tmp_path / "whole.jsonl").status == 0
    assert without_times(tmp_path / "out.jsonl") == without_times(tmp_path / "whole.jsonl")


def test_ask(checkpoint: Path, vtengine: Run, questions: Run, tmp_path: Path) -> None:
    questions(1)
    done = vtengine("ask", tmp_path / "p0.png", "What?", *flags(checkpoint))
    assert done.status == 0 and "turn 1: image" in done.out and "visual tokens: 4 of 12" in done.out


def break_tensors(folder: Path, change: str) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if name.endswith("mlp.down_proj.weight"))
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["model.layers.7.odd.weight"] = torch.zeros(3)
    elif change == "misshapen":
        tensors[name] = tensors[name][:-1].contiguous()
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif change == "absent":
        path.unlink()
    else:
        save_file(tensors, path)


@pytest.mark.parametrize("change", ["missing", "extra", "misshapen", "cut", "absent"])
def test_broken_checkpoint_is_one_line(
    checkpoint: Path, vtengine: Run, questions: Run, tmp_path: Path, change: str
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    break_tensors(folder, change)
    done = vtengine("generate", questions(1), "-o", tmp_path / "out.jsonl", *flags(folder))
    assert done.status == 2 and done.err.count("\n") == 1 and str(folder) in done.err
    if change in ("missing", "misshapen"):
        assert "mlp.down_proj.weight" in done.err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {"hidden_size": 63}, {"num_hidden_layers": "two"}])
def test_unusable_config_is_one_line(
    checkpoint: Path, vtengine: Run, questions: Run, tmp_path: Path, config: dict
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    before = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(before | config))
    done = vtengine("generate", questions(1), "-o", tmp_path / "out.jsonl", *flags(folder))
    assert (
        done.status == 2
        and done.err.count("\n") == 1
        and next(iter(config)) in done.err.replace("num_layers", "num_hidden_layers")
    )


def test_what_does_not_fit_is_said(
    checkpoint: Path, vtengine: Run, questions: Run, rows_of: Run, without_times: Run, tmp_path: Path
) -> None:
    path, out = questions(1, {"id": "long", "image": "p0.png", "question": "x" * 4000}), tmp_path / "out.jsonl"
    tiny = [*flags(checkpoint), "--kv-gb", "0.0001"]
    assert vtengine("generate", path, "-o", out, *tiny).status == 3
    error = rows_of(out)[1]["error"]
    assert error["code"] == "request_too_large" and "--kv-gb" in error["message"] and "long" not in error["message"]
    whole = without_times(out)
    out.write_bytes(out.read_bytes().split(b"\n")[0] + b"\n")
    assert vtengine("generate", path, "-o", out, *tiny, "--resume").status == 3
    assert without_times(out) == whole
    vtengine("generate", path, "-o", out, *flags(checkpoint), "--resume")  # there is room now
    assert rows_of(out)[1]["turns"]
    for much_or_little in ("1000000", "0.0000001"):
        done = vtengine("generate", path, "-o", out, *flags(checkpoint), "--kv-gb", much_or_little)
        assert done.status == 2 and "--kv-gb" in done.err and done.err.count("\n") == 1


def test_graphs_can_be_left_out(
    checkpoint: Path, vtengine: Run, questions: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    of = Runner.__init__

    def spied(self: Runner, *arguments: Any) -> None:
        asked.append(arguments[-1])
        of(self, *arguments)

    monkeypatch.setattr(Runner, "__init__", spied)
    for flag in ([], ["--no-cuda-graphs"]):
        command = ["generate", questions(1), "-o", tmp_path / f"out{len(flag)}.jsonl", *flags(checkpoint), *flag]
        assert vtengine(*command).status == 0
    assert asked == [True, False]


@pytest.mark.parametrize("temperature", ["1e-40", "1e-5", "100"])
def test_any_temperature_gives_rows(
    checkpoint: Path, vtengine: Run, questions: Run, rows_of: Run, tmp_path: Path, temperature: str
) -> None:
    command = ["generate", questions(2), "-o", tmp_path / "out.jsonl", *flags(checkpoint)]
    assert vtengine(*command, "--temperature", temperature).status == 0
    assert all(row["logprob_sum"] <= 0 for row in rows_of(tmp_path / "out.jsonl"))


@pytest.mark.parametrize("nested", [False, True])
def test_the_context_is_the_models(
    checkpoint: Path, vtengine: Run, questions: Run, rows_of: Run, tmp_path: Path, nested: bool
) -> None:
    folder = tmp_path / "short"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 200}
    if nested:
        config = {"text_config": config} | config | {"max_position_embeddings": 10**6}
    (folder / "config.json").write_text(json.dumps(config))
    path = questions(1, {"id": "long", "image": "p0.png", "question": "x" * 400})
    assert vtengine("generate", path, "-o", tmp_path / "out.jsonl", *flags(folder)).status == 3
    assert [row["error"]["code"] for row in rows_of(tmp_path / "out.jsonl")][1] == "prompt_too_long"
