"""`vtengine-train judge-check` as a command: what it prints, and how it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from vtengine_training.cli import main
from vtengine_training.rewards.judge.check import all_probes

from tests.training.rewards.judge_server import honest, serving, status

SHIPPED = Path(__file__).parents[3] / "configs" / "example_judge-check.toml"


@pytest.fixture
def config(tmp_path):
    def write(url="http://127.0.0.1:9/v1", **changes):
        lines = [f'url = "{url}"', 'model = "tiny"', "backoff_s = 0.0", *(f"{k} = {v}" for k, v in changes.items())]
        path = tmp_path / "grpo.toml"
        path.write_text(
            'model = "glance"\noutput = "runs/x"\n[data]\nfiles = ["x.jsonl"]\n'
            '[reward]\naccuracy = "judge"\n[reward.judge]\n' + "\n".join(lines)
        )
        return str(path)

    return write


def test_a_good_judge(config, capsys):
    pytest.importorskip("openai")
    with serving(honest) as server:
        assert main(["judge-check", config(server.url, price_prompt=1.0)]) == 0
    said = capsys.readouterr()
    total = len(all_probes())
    assert said.out == f"of {total} probes {total} right, 0 wrong, 0 without a verdict\n"
    assert "cost 0.0" in said.err and f"{len(server.asked)} requests" in said.err


def test_a_judge_that_passes_everything(config, capsys):
    pytest.importorskip("openai")
    with serving(lambda asked: asked.verdict(True)) as server:
        assert main(["judge-check", config(server.url)]) == 1
    said = capsys.readouterr().out
    assert "WRONG  injection: ignore: said correct" in said and "WRONG  other: said correct" in said


def test_a_judge_that_is_down(config, capsys):
    pytest.importorskip("openai")
    with serving(lambda asked: status(500)) as server:
        assert main(["judge-check", config(server.url, breaker_failures=2, breaker_pause_s=30)]) == 1
    *lines, counts = capsys.readouterr().out.splitlines()
    assert all(line.startswith("NO VERDICT  ") for line in lines) and "http://" in lines[0]
    total, missing = len(all_probes()), len(lines)
    assert counts == f"of {total} probes {total - missing} right, 0 wrong, {missing} without a verdict"
    assert 0 < missing < total, "what is not asked at all, empty or too long, is right"
    assert len(server.asked) < 300


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "[reward.judge]"),
        ("reward = 3", "[reward.judge]"),
        ('[reward.judge]\nmodle = "x"', "did you mean model"),
        ("[reward.judge]\n", "name the model"),
        ("[reward", "not TOML"),
        ('[reward.judge]\nmodel = "x"\n[reward.penalti]', "did you mean penalty"),
        ('[reward.judge]\nmodel = "x"\n[modle]', "unknown key"),
    ],
)
def test_a_config_that_cannot_be_used_is_one_line(tmp_path, capsys, text, says):
    path = tmp_path / "c.toml"
    path.write_text(text)
    assert main(["judge-check", str(path)]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_the_shipped_config_and_the_dry_run(capsys):
    assert main(["judge-check", str(SHIPPED), "--set", "reward.judge.model=other", "--dry-run"]) == 0
    assert 'model = "other"' in capsys.readouterr().out
    assert main(["judge-check", str(SHIPPED), "--set", "reward.judge.modle=other"]) == 2
    assert "--set reward.judge.modle=other: reward.judge.modle: unknown key" in capsys.readouterr().err
