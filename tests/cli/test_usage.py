"""Bad usage is one line and status 2, never a traceback; help is free and has examples."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
COMMANDS = ("generate", "ask", "view", "bench", "doctor")


def fails(done: Any, *words: str) -> None:
    lines = [line for line in done.err.splitlines() if line]
    assert done.status == 2, done
    assert len(lines) == 1 and lines[0].startswith("vtengine") and len(lines[0]) < 400, lines
    assert all(word in lines[0] for word in words), lines
    assert not done.out


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_has_examples(vtengine: Run, command: list[str]) -> None:
    done = vtengine(*command, "--help")
    assert done.status == 0 and not done.err
    assert "examples:" in done.out and f"vtengine {' '.join(command)}".strip() in done.out
    assert max(map(len, done.out.splitlines())) <= 130


def test_help_and_usage_errors_import_nothing_heavy() -> None:
    script = (
        "import sys\nfrom vtengine.cli import main\n"
        "for line in (['--help'], ['generate', '--help'], ['generate', 'x', '-o', 'y', '--n', '0'], ['--version']):\n"
        "    try: main(line)\n    except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'PIL', 'rich', 'jinja2', 'tokenizers', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_closed_streams_lead_nowhere() -> None:
    """As a daemon may be started: what is opened later must not become its output, nor that of its engines."""
    script = (
        "import os\n"
        "for descriptor in range(3): os.close(descriptor)\n"
        "import sys\nsys.stdout = sys.stderr = None\n"  # as Python sets them when it starts so
        "from vtengine.cli.command import main\n"
        "status = main(['view', sys.argv[1], '-o', sys.argv[2]])\n"
        "places = [os.readlink(f'/proc/self/fd/{descriptor}') for descriptor in range(3)]\n"
        "print('told nobody')\n"
        "os._exit(10 * status + (places == ['/dev/null'] * 3 and all(map(os.get_inheritable, range(3)))))"
    )
    done = subprocess.run([sys.executable, "-c", script, "missing.jsonl", "out.html"], check=False)
    assert done.returncode == 21  # status 2: there is no such file


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["COMMAND"]),
        (["fly"], ["fly"]),
        (["genrate", "in.jsonl"], ["genrate", "did you mean generate?"]),
        (["ask", "p.png", "what?", "--resolution", "hihg"], ["did you mean high?"]),
        (["bench", "pachify"], ["did you mean patchify?"]),
        (["generate", "in.jsonl"], ["-o"]),
        (["generate", "in.jsonl", "-o", "o", "--n", "0"], ["--n", "'0'"]),
        (["generate", "in.jsonl", "-o", "o", "--n", "many"], ["--n", "'many'"]),
        (["generate", "in.jsonl", "-o", "o", "--concurrency", "-1"], ["--concurrency"]),
        (["generate", "in.jsonl", "-o", "o", "--temperature", "nan"], ["--temperature", "'nan'"]),
        (["generate", "in.jsonl", "-o", "o", "--temperature", "-1"], ["--temperature"]),
        (["generate", "in.jsonl", "-o", "o", "--top-p", "0"], ["--top-p"]),
        (["generate", "in.jsonl", "-o", "o", "--resolution", "medium"], ["medium", "adaptive"]),
        (["generate", "in.jsonl", "-o", "o", "--seed", "1e3"], ["--seed"]),
        (["generate", "in.jsonl", "-o", "o", "--seed", str(2**64)], ["--seed"]),
        (["generate", "in.jsonl", "-o", "o", "--sede", "1"], ["generate: ", "--sede", "did you mean --seed?"]),
        (["ask", "p.png", "what?", "--modle=glance"], ["ask: ", "did you mean --model?"]),
        (["generate", "in.jsonl", "-o", "o", "--backend", "ftp://localhost"], ["unknown", "http://host:port"]),
        (["generate", "in.jsonl", "-o", "o", "--backend", "magic"], ["magic", "embedded"]),
        (["generate", "in.jsonl", "-o", "o", "--allow-private-hosts"], ["--allow-private-hosts", "--allow-http"]),
        (["ask", "p.png", "what?", "--allow-private-hosts"], ["--allow-private-hosts", "--allow-http"]),
        (["serve", "--allow-private-hosts"], ["--allow-private-hosts", "--allow-http"]),
        (["generate", "absent.jsonl", "-o", "o"], ["absent.jsonl: cannot be read: No such file"]),
        (["generate", ".", "-o", "o"], ["directory"]),
        (["generate", "in.jsonl", "-o", "in.jsonl"], ["input itself"]),
        (["generate", "old.jsonl.kept", "-o", "old.jsonl"], ["old.jsonl.kept", "is the input"]),
        (["generate", "old.jsonl.run", "-o", "old.jsonl"], ["old.jsonl.run", "is the input"]),
        (["generate", "/dev/null", "-o", "o"], ["/dev/null", "regular file"]),
        (["generate", "table.csv", "-o", "o"], ["table.csv", "no line of it is a JSON object (line 1: ", "UTF-8"]),
        (["generate", "-", "-o", "o"], ["-", "regular file"]),
        (["generate", "in.jsonl", "-o", "-"], ["-o -", "/dev/stdout"]),
        (["generate", "in.jsonl", "-o", "o", "--image-root", "absent"], ["--image-root", "absent"]),
        (["generate", "in.jsonl", "-o", "o", "--model", "absent"], ["--model", "absent"]),
        (["generate", "in.jsonl", "-o", "o", "--model", "./absent/folder"], ["--model", "no such folder"]),
        (["generate", "in.jsonl", "-o", "o", "--model", "in.jsonl"], ["--model", "file"]),
        (["generate", "in.jsonl", "-o", "o", "--model", "empty"], ["--model", "config.json"]),
        (["ask", "p.png", " "], ["QUESTION"]),
        (["ask", "p.png", "what?", "--model", "absent"], ["absent"]),
        (["view", "absent.jsonl", "-o", "o.html"], ["absent.jsonl"]),
        (["view", "in.jsonl", "-o", "in.jsonl"], ["input itself"]),
        (["view", "in.jsonl", "-o", "o.html"], ["line 1", "status"]),
        (["view", "out.jsonl", "-o", "absent/o.html"], ["-o absent/o.html: cannot be written: absent is no folder"]),
        (["view", "out.jsonl", "-o", "o.html", "--image-root", "absent"], ["--image-root"]),
        (["bench", "nothing"], ["nothing"]),
        (["bench"], ["SUITE"]),
    ],
)
def test_bad_usage_is_one_line(
    vtengine: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"image": "p.png", "question": "q"}\n')
    (tmp_path / "out.jsonl").write_text('{"status": "answered"}\n')
    for name in ("old.jsonl", "old.jsonl.kept", "old.jsonl.run"):
        (tmp_path / name).write_text('{"image": "p.png", "question": "q"}\n')
    (tmp_path / "table.csv").write_text("id,image\n7,p.png\n")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    fails(vtengine(*arguments), *words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("target", ["absent/out.jsonl", "folder", "in.jsonl/out.jsonl"])
def test_output_that_cannot_be_written(
    vtengine: Run, scripted: Run, questions: Run, tmp_path: Path, target: str
) -> None:
    (tmp_path / "folder").mkdir()
    fails(vtengine("generate", questions(1), "-o", tmp_path / target, *scripted()), str(tmp_path / target), "written")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", None, ["tokenizer.json"]),
        ("tokenizer.json", "{}", ["tokenizer.json"]),
        ("config.json", "{", ["config.json"]),
        ("config.json", '{"image_token_id": 3}', ["image_token_id"]),
        ("profile.toml", "name = 1", ["name"]),
        ("profile.toml", "[", ["TOML"]),
        ("preprocessor_config.json", '{"max_pixels": -1}', ["max_pixels"]),
        ("preprocessor_config.json", "{", ["preprocessor_config.json"]),
        ("preprocessor_config.json", '{"min_pixels": "few"}', ["min_pixels = 'few'"]),
        ("preprocessor_config.json", '{"patch_size": 16}', ["patch_size = 16", "only 14"]),
        ("preprocessor_config.json", '{"image_mean": [0.5, 0.5, 0.5]}', ["image_mean", "0.48145466"]),
        ("preprocessor_config.json", '{"image_std": 1}', ["image_std = 1"]),
    ],
)
def test_bad_files_in_the_model_folder(
    vtengine: Run,
    scripted: Run,
    questions: Run,
    model_folder: Path,
    tmp_path: Path,
    name: str,
    content: str | None,
    words: list,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    flags = [*scripted(), "--model", str(folder)]
    fails(vtengine("generate", questions(1), "-o", tmp_path / "out.jsonl", *flags), "--model", *words)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--profile", "absent"], ["profile", "absent", "glance"]),
        (["--device", "quantum"], ["--device", "quantum"]),
        (["--device", "cuda:99"], ["--device", "cuda:99"]),
        (["--device", "meta"], ["--device"]),
    ],
)
def test_bad_engine_flags(
    vtengine: Run, scripted: Run, questions: Run, tmp_path: Path, flags: list, words: list
) -> None:
    fails(vtengine("generate", questions(1), "-o", tmp_path / "out.jsonl", *scripted(), *flags), *words)


def test_doctor_names_kernels_and_packages(vtengine: Run) -> None:
    done = vtengine("doctor")
    assert done.status in (0, 1) and all(word in done.out for word in ("torch", "patchify", "cpu features", "glance"))
    findings = json.loads(vtengine("doctor", "--json").out)
    assert {finding["state"] for finding in findings} <= {"ok", "slower", "missing"}
    assert all(finding["detail"] for finding in findings)


def test_what_is_piped_has_no_spaces_at_the_ends_of_lines(
    vtengine: Run, scripted: Run, questions: Run, tmp_path: Path
) -> None:
    said = vtengine("doctor").out, vtengine("generate", questions(3), "-o", tmp_path / "o.jsonl", *scripted()).out
    for text in said:
        lines = text.splitlines()
        assert len(lines) > 5 and [line for line in lines if line != line.rstrip()] == []


@pytest.mark.parametrize("quick", [True, False])
def test_bench_hands_a_suite_to_the_runner(vtengine: Run, monkeypatch: pytest.MonkeyPatch, quick: bool) -> None:
    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        assert command[2:] == ["--suite", "patchify", *(["--quick"] if quick else [])] and not check
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr("vtengine.cli.bench.subprocess.run", run)
    assert vtengine("bench", "patchify", *(["--quick"] if quick else [])).status == 7


def test_bench_lists_its_suites_and_what_they_measure(vtengine: Run) -> None:
    listed = vtengine("bench", "--list")
    assert listed.status == 0 and re.search(r"^two_turn +Two-turn batches", listed.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("preprocessor_config.json", {"min_pixels": 784, "max_pixels": 3136}),
        ("preprocessor_config.json", {"size": {"shortest_edge": 784, "longest_edge": 3136}}),
        ("preprocessor_config.json", {"max_pixels": 3136, "size": {"shortest_edge": 784, "longest_edge": 9999999}}),
        ("preprocessor_config.json", {"min_pixels": 784, "max_pixels": 3136, "size": 5, "image_processor": [1]}),
        ("processor_config.json", {"image_processor": {"size": {"shortest_edge": 784, "longest_edge": 3136}}}),
    ],
)
def test_sizes_are_those_of_the_checkpoint(
    vtengine: Run, scripted: Run, questions: Run, model_folder: Path, rows_of: Run, tmp_path: Path,
    name: str, config: dict[str, object],
) -> None:  # fmt: skip
    folder = tmp_path / "limited"
    shutil.copytree(model_folder, folder)
    (folder / name).write_text(json.dumps(config))
    out = tmp_path / "out.jsonl"
    assert vtengine("generate", questions(2), "-o", out, *scripted(), "--model", folder).status == 0
    assert {row["visual_tokens_full"] for row in rows_of(out)} <= {2, 3, 4}
