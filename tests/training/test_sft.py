"""The cold start itself: configuration errors, a few steps, exact resume, and a checkpoint others can load."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from vtengine_training.cli import main
from vtengine_training.glance import KINDS
from vtengine_training.lora.config import LoraConfig
from vtengine_training.sft.batch import drawn_kinds
from vtengine_training.sft.config import DataConfig, PhaseConfig, SftConfig, ShapeConfig
from vtengine_training.sft.evaluate import forced_accuracy, questions
from vtengine_training.sft.optim import learning_rate
from vtengine_training.sft.trainer import Run, phase_at
from vtengine_training.stopping import EXIT_STOPPED

from vtengine.config import ConfigError, load_config, to_toml
from vtengine.model import load_model
from vtengine.protocol.profile import load_profile

CONFIGS = Path(__file__).parents[2] / "configs"
SHAPE = ShapeConfig(
    text_hidden=128, text_layers=1, text_heads=2, text_kv_heads=1, text_inner=64,
    vision_hidden=64, vision_layers=2, vision_heads=2, vision_inner=64, full_attention=(1,),
)  # fmt: skip


def small(output: Path, **changes: object) -> SftConfig:
    phases = (
        PhaseConfig("vision", steps=1, scenes=2, questions=0, warmup=1, low_share=1.0),
        PhaseConfig("talk", steps=2, scenes=2, questions=2, warmup=1, pages=1, look_weight=0.3),
    )
    config = SftConfig(
        output=str(output), shape=SHAPE, data=DataConfig(workers=0), phases=phases,
        log_every=1, eval_every=100, eval_questions=2, save_every=100,
    )  # fmt: skip
    return replace(config, **changes)  # type: ignore[arg-type]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder / "model").state_dict()


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole: list[dict[str, object]] = []
    Run(small(tmp_path / "whole")).train(whole.append)
    first, second = Run(small(tmp_path / "cut")), Run(small(tmp_path / "cut"))
    first.train(lambda _: None, until=2)
    rest: list[dict[str, object]] = []
    assert second.resume() and second.step == 2
    second.train(rest.append)
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], two[name]) for name in one)
    final = [next(r for r in rows if r["step"] == 3 and "norm" in r) for rows in (whole, rest)]
    assert final[0] | {"seconds": 0} == final[1] | {"seconds": 0}


def sft_process(config: Path, program: Sequence[str] = ("-m", "vtengine_training.cli")) -> subprocess.Popen[str]:
    """The command, in a process group of its own."""
    repo = CONFIGS.parent
    environment = os.environ | {"PYTHONPATH": f"{repo}:{repo / 'kernels'}:{repo / 'training'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *program, "sft", str(config)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_finishes_the_step_saves_and_has_its_own_status(tmp_path: Path, number: int) -> None:
    """To the whole process group, as a terminal and a scheduler send it: worker processes leave it to the run."""
    phases = (PhaseConfig("talk", steps=400, scenes=2, questions=2, warmup=1),)
    config = small(tmp_path / "run", phases=phases, data=DataConfig(workers=1, prefetch=4), eval_every=1000)
    (tmp_path / "run.toml").write_text(to_toml(config))
    process = sft_process(tmp_path / "run.toml")
    try:
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.is_file() and metrics.read_bytes().count(b"\n") > 1) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, number)
        said = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == EXIT_STOPPED, said
    rows = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert f"stopped and saved at step {rows[-1]} of 400" in said and 2 <= rows[-1] < 400
    assert rows == list(range(1, rows[-1] + 1))
    again = Run(config)
    assert again.resume() and again.step == rows[-1]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


KILLED_AFTER_STEP_5 = """
import os, signal
from vtengine_training import cli
from vtengine_training.loggers.jsonl import JsonLines
log = JsonLines.log

def log_until_5(self, row):
    log(self, row)
    if row["step"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)

JsonLines.log = log_until_5
cli.program()
"""
"""From outside one would often be late: step 6 and its save take less than a moment."""


def test_kill_9_leaves_no_row_twice_and_none_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed between two saves, in the step after a validation: the rows of lost steps are those of the second run."""
    phases = (PhaseConfig("talk", steps=7, scenes=2, questions=2, warmup=1),)
    config = small(tmp_path / "cut", phases=phases, save_every=3, eval_every=2, data=DataConfig(workers=0))
    (tmp_path / "run.toml").write_text(to_toml(config))
    process, metrics = (
        sft_process(tmp_path / "run.toml", ("-c", KILLED_AFTER_STEP_5)),
        tmp_path / "cut" / "metrics.jsonl",
    )
    said = process.communicate(timeout=120)[1]
    assert process.returncode == -signal.SIGKILL, said
    assert json.loads((tmp_path / "cut" / "resume.json").read_text())["step"] == 3
    assert main(["sft", str(tmp_path / "run.toml")]) == 0
    assert "going on from step 3" in capsys.readouterr().err
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows if "norm" in row] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["step"] for row in rows if "validation" in row] == [2, 4, 6, 7]


def test_stopping_saves_what_an_uninterrupted_run_has_there(tmp_path: Path) -> None:
    Run(small(tmp_path / "whole")).train(lambda _: None)
    run = Run(small(tmp_path / "cut"))
    run.train(lambda row: setattr(run, "stop_requested", row["step"] >= 1))
    assert run.step == 2  # asked after step 1 was over
    again = Run(small(tmp_path / "cut"))
    assert again.resume() and again.step == 2
    again.train(lambda _: None)
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, SafetensorError("I/O error: No space left on device")])
def test_a_save_that_is_cut_short_leaves_the_one_before(tmp_path: Path, monkeypatch, fault) -> None:
    run = Run(small(tmp_path))
    run.train(lambda _: None, until=1)
    run.step = 2

    def cut(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise fault

    monkeypatch.setattr("safetensors.torch.save_file", cut)
    expected = OSError if isinstance(fault, Exception) else KeyboardInterrupt
    with pytest.raises(expected, match=r"resume-2\.safetensors: cannot be written" if expected is OSError else None):
        run.save()
    assert sorted(path.name for path in tmp_path.glob("resume*")) == ["resume-1.safetensors", "resume.json"]
    again = Run(small(tmp_path))
    assert again.resume() and again.step == 1


def test_worker_processes_make_the_same_batches(tmp_path: Path) -> None:
    Run(small(tmp_path / "here")).train(lambda _: None)
    Run(small(tmp_path / "there", data=DataConfig(workers=1, prefetch=2))).train(lambda _: None)
    one, two = weights(tmp_path / "here"), weights(tmp_path / "there")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    Run(small(tmp_path)).save()
    with pytest.raises(ValueError, match="shape"):
        Run(small(tmp_path, shape=replace(SHAPE, text_inner=96))).resume()


def test_a_run_can_begin_with_a_checkpoint(tmp_path: Path) -> None:
    first = Run(small(tmp_path / "first"))
    first.export(tmp_path / "model")
    again = Run(small(tmp_path / "again", init=str(tmp_path / "model"), seed=5, bfloat16=False))
    assert again.tokenizer.to_str() == first.tokenizer.to_str()
    for name, weight in again.model.state_dict().items():
        assert torch.equal(weight, first.model.state_dict()[name].float()), name
    with pytest.raises(ValueError, match="init"):
        Run(small(tmp_path / "other", init=str(tmp_path / "model"), shape=replace(SHAPE, text_inner=96)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for adapters to sit on."""
    folder = tmp_path_factory.mktemp("base")
    Run(small(folder)).export(folder)
    return folder


def adapting(output: Path, base: Path, **changes: object) -> SftConfig:
    lora = LoraConfig(rank=4, dropout=0.1, vision=True)
    return small(output, **{"init": str(base), "lora": lora, **changes})


def test_adapters_learn_alone_and_resume_to_the_bit(tmp_path: Path, base: Path) -> None:
    pytest.importorskip("peft")
    Run(adapting(tmp_path / "whole", base)).train(lambda _: None)
    Run(adapting(tmp_path / "cut", base)).train(lambda _: None, until=2)
    rest = Run(adapting(tmp_path / "cut", base))
    assert rest.resume() and rest.step == 2
    rest.train(lambda _: None)
    before, (one, two) = load_model(base).state_dict(), (weights(tmp_path / name) for name in ("whole", "cut"))
    changed = {name for name, tensor in one.items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.endswith("weight") and "merger" not in name for name in changed)
    assert any(name.startswith("visual.blocks") for name in changed)
    assert all(torch.equal(one[name], two[name]) for name in one)
    files = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    saved = load_file(tmp_path / "whole" / "resume-3.safetensors")
    assert all(".head." in name or "lora_" in name for name in saved)


def test_adapters_go_on_only_on_their_own_model(tmp_path: Path, base: Path) -> None:
    pytest.importorskip("peft")
    Run(adapting(tmp_path / "run", base)).save()
    with pytest.raises(ValueError, match=r"another \[lora\]"):
        Run(adapting(tmp_path / "run", base, lora=LoraConfig(rank=4, alpha=8))).resume()
    Run(small(tmp_path, seed=9)).export(tmp_path / "other")
    with pytest.raises(ValueError, match=r"another \[init\]"):
        Run(adapting(tmp_path / "run", tmp_path / "other")).resume()


def test_training_learns_the_format(tmp_path: Path) -> None:
    phases = (PhaseConfig("talk", steps=12, scenes=4, learning_rate=3e-3, warmup=2),)
    figures: list[dict[str, float]] = []
    Run(small(tmp_path, phases=phases, bfloat16=False)).train(figures.append)  # type: ignore[arg-type]
    losses = [row["language_loss"] for row in figures if "language_loss" in row]
    assert losses[-1] < losses[0] * 0.8


def test_a_head_learns_where_to_look(tmp_path: Path) -> None:
    shape = replace(SHAPE, text_layers=3)
    phases = (PhaseConfig("talk", steps=30, scenes=3, learning_rate=3e-3, warmup=2, look_weight=1.0),)
    figures: list[dict[str, float]] = []
    Run(small(tmp_path, shape=shape, phases=phases, bfloat16=False)).train(figures.append)  # type: ignore[arg-type]
    looks = [row["look"] for row in figures if "look" in row]
    assert max(looks[-5:]) > looks[0]


def test_evaluation_counts_by_kind(tmp_path: Path) -> None:
    run = Run(small(tmp_path))
    asked = questions("validation", 0, 9)
    found = forced_accuracy(run.model, run.teaching.renderer, asked, run.teaching.image_token)
    assert {"high/all", "two/all", "format"} <= set(found)
    assert all(0 <= value <= 1 for value in found.values())


def test_phases_and_rates() -> None:
    config = small(Path("x"))
    assert [phase_at(config, step)[0].name for step in range(3)] == ["vision", "talk", "talk"]
    with pytest.raises(ValueError, match="past"):
        phase_at(config, 3)
    phase = PhaseConfig(steps=100, warmup=10, learning_rate=1.0, final_rate=0.1)
    assert learning_rate(phase, 0) == pytest.approx(0.1)
    assert learning_rate(phase, 10) == pytest.approx(1.0)
    assert learning_rate(phase, 100) == pytest.approx(0.1)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("glance_*sft.toml")), ids=lambda p: p.name)
def test_shipped_configs_load(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_config(SftConfig, path).total_steps > 100
    assert main(["sft", str(path), "--dry-run", "--set", "seed=4"]) == 0
    assert "seed = 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("sede=1", "sede"),
        ("shape.text_hiden=1", "text_hiden"),
        ("data.call_share=2.0", "call_share"),
        ("data.workers=-1", "workers"),
        ("threads='a'", "threads"),
        ("phases=[]", "phases"),
        ("lora.rank=4", "name it with init"),
        ("loggers=['tensorbord']", "did you mean tensorboard"),
        ("phases=[{name='a', steps=0}]", "steps"),
        ("phases=[{name='a', steps=9, warmup=10}]", "warmup = 10: must be at most steps"),
        ("phases=[{name='a', low_share=0.7, high_share=0.7}]", "low_share"),
    ],
)
def test_config_errors_name_the_field(override: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(SftConfig, None, [override])
    assert main(["sft", str(CONFIGS / "glance_sft.toml"), "--dry-run", "--set", override]) == 2
    assert named in capsys.readouterr().err


def test_exported_folder_is_complete(tmp_path: Path) -> None:
    Run(small(tmp_path)).save()
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
        "generation_config.json", "chat_template.json", "profile.toml",
    } <= names  # fmt: skip
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "qwen2_5_vl"
    assert load_profile(tmp_path / "model") == load_profile("glance")


def test_kinds_of_scenes_are_drawn_by_weight() -> None:
    data, others = DataConfig(seed=1), {kind: 0.0 for kind in KINDS if kind not in ("label", "meter")}
    phase = PhaseConfig(scenes=400, kinds=others | {"label": 3.0})
    drawn = drawn_kinds(data, phase, step=5)
    assert set(drawn) == {"label", "meter"} and 250 < drawn.count("label") < 350
    assert drawn == drawn_kinds(data, phase, step=5) != drawn_kinds(data, phase, step=6)
    assert drawn_kinds(data, PhaseConfig(scenes=3), step=5) == [None] * 3


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        ({"lable": 2.0}, "kinds.lable: unknown; known: note, label"),
        ({"label": -1.0}, "kinds.label = -1.0: must be 0 or more"),
        ({"label": float("inf")}, "finite"),
        (dict.fromkeys(KINDS, 0.0), "every weight is 0"),
    ],
)
def test_weights_that_draw_nothing_are_refused(kinds: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        PhaseConfig(kinds=kinds)
