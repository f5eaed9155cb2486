"""The benchmark runner, and tables that match the committed results."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from vtengine_kernels.prefix_attention import siblings, triton

from vtengine.engine.embedded.config import GPU_PAGE_SIZE, PAGE_SIZE
from vtengine.engine.embedded.families import Families
from vtengine.stamp import stamp


def load(repo_root: Path, name: str) -> ModuleType:
    """A file of benchmarks/ as a module, by its path."""
    sys.path.insert(0, str(repo_root / "benchmarks"))
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", repo_root / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


RESULT = {
    "suite": "demo",
    "quick": False,
    "stamp": {
        "commit": "0123456789abcdef",
        "dirty": False,
        "machine": {"cpu": "a CPU", "cores": 2, "memory_gib": 8.0, "gpu": None},
        "versions": {"python": "3.11.0", "torch": "2.13.0"},
        "date": "2025-01-01T00:00:00+00:00",
    },
    "tables": {"demo-fast": {"columns": {"name": "Name", "ms": "Time, ms"}, "where": {"kind": "fast"}}},
    "rows": [
        {"name": "a|b", "kind": "fast", "ms": 1.23456, "curve": [1, 2]},
        {"name": "c", "kind": "slow", "ms": 12345.6, "curve": []},
    ],
}


def project(root: Path, page: str, result: dict = RESULT) -> Path:
    (root / "benchmarks" / "results").mkdir(parents=True)
    (root / "benchmarks" / "results" / "demo.json").write_text(json.dumps(result), encoding="utf-8")
    (root / "README.md").write_text(page, encoding="utf-8")
    return root


def test_pages_match_the_results(repo_root: Path) -> None:
    """A number in the docs is rendered, never typed: `make report` after `make bench`."""
    assert load(repo_root, "report").update(repo_root, check=True) == []


def test_every_result_is_a_full_run(repo_root: Path) -> None:
    for path in (repo_root / "benchmarks" / "results").glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["suite"] == path.stem
        assert result["stamp"]["commit"] and result["stamp"]["versions"]["python"]
        assert not result["quick"] and result["rows"]


def test_report_fills_and_is_then_quiet(repo_root: Path, tmp_path: Path) -> None:
    report = load(repo_root, "report")
    root = project(tmp_path, "top\n<!-- results:demo-fast -->\nold\n<!-- /results -->\nend\n")
    assert report.update(root, check=True) == ["README.md"]
    assert report.update(root, check=False) == ["README.md"]
    assert report.update(root, check=True) == []
    text = (root / "README.md").read_text(encoding="utf-8")
    assert "| Name | Time, ms |\n|---|---:|\n| a\\|b | 1.23 |\n" in text
    assert "12,346" not in text and "old" not in text and "0123456789" in text


def test_report_writes_what_the_product_reads(repo_root: Path, tmp_path: Path) -> None:
    report = load(repo_root, "report")
    root = project(tmp_path, "", {**RESULT, "data": {"measured.json": {"siblings": [2], "tokens": [64]}}})
    assert report.update(root, check=True) == ["measured.json"]
    assert report.update(root, check=False) == ["measured.json"]
    assert report.update(root, check=True) == []
    found = json.loads((root / "measured.json").read_text(encoding="utf-8"))
    assert found["tokens"] == [64] and "benchmarks/results/demo.json" in found["source"]


@pytest.mark.parametrize(("split_us", "shares"), [(40.0, True), (80.0, False)])
def test_from_which_siblings_on_a_gpu_shares_is_what_its_suite_found(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split_us: float, shares: bool
) -> None:
    """From rows through report.py to the engine. Small batches lose, and all together win from 1,024 tokens on."""
    suite, report = load(repo_root, "run").load_suite("gpu_siblings"), load(repo_root, "report")
    rows = [
        {"batch": batch, "n": 8, "prefix": prefix, "plain_us": plain, "split_us": split}
        for batch, prefix, plain, split in (
            (8, 256, 15.0, 20.0), (64, 256, 25.0, 26.0), (8, 1024, 15.0, 20.0), (64, 1024, 60.0, split_us),
        )
    ]  # fmt: skip
    root = project(tmp_path, "", {**RESULT, "data": suite.data(rows)})
    folder = (root / suite.CROSSOVER).parent
    folder.mkdir(parents=True)
    assert report.update(root, check=False) == [suite.CROSSOVER]
    monkeypatch.setattr(siblings, "__file__", str(folder / "siblings.py"))
    siblings._measured.cache_clear()
    monkeypatch.setattr(triton, "missing", lambda: None)
    keys = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    tables = [[*range(64), 100 + row] for row in range(8)]
    try:
        found, few = (Families.for_cache(keys, 16, None).of(known) for known in (tables, tables[:7]))
    finally:
        siblings._measured.cache_clear()
    if shares:
        assert found.shared.tolist() == [0] + 7 * [1024] and few.shared.tolist() == 7 * [0]  # strangers, in its kernel
    else:
        assert found is few is None


def test_report_without_columns_shows_all_plain_ones(repo_root: Path, tmp_path: Path) -> None:
    root = project(tmp_path, "<!-- results:demo -->\n<!-- /results -->\n")
    load(repo_root, "report").update(root, check=False)
    text = (root / "README.md").read_text(encoding="utf-8")
    assert "| name | kind | ms |" in text and "12,346" in text and "curve" not in text


@pytest.mark.parametrize(
    ("page", "result", "message"),
    [
        ("<!-- results:other -->\n<!-- /results -->\n", RESULT, "no result holds the table 'other'"),
        ("<!-- results:demo -->\n", RESULT, "1 tables are opened but 0 are closed"),
        ("", {**RESULT, "quick": True}, "comes from a quick run"),
    ],
)
def test_report_refuses(repo_root: Path, tmp_path: Path, page: str, result: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(repo_root, "report").update(project(tmp_path, page, result), check=False)


def test_compare_interleaves_and_counts(repo_root: Path, tmp_path: Path) -> None:
    measure = load(repo_root, "measure")
    seen: list[str] = []
    found = measure.Context(quick=False, results=tmp_path).compare(
        {name: (lambda name=name: seen.append(name)) for name in "abc"}, rounds=3, warmup=0
    )
    assert "".join(seen) == "abcbcacab"
    assert set(found) == {"a", "b", "c"} and found["a"].rounds == 3
    assert found["a"].min_s <= found["a"].median_s <= found["a"].p90_s


def test_summary_of_known_rounds(repo_root: Path) -> None:
    measure = load(repo_root, "measure")
    got = measure.summarise([5.0, 1.0, 4.0, 2.0, 3.0], [0.5, 0.1, 0.4, 0.2, 0.3])
    assert (got.median_s, got.min_s, got.p90_s, got.cpu_s, got.rounds) == (3.0, 1.0, 5.0, 0.3, 5)


def test_compare_refuses_no_rounds(repo_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rounds = 0"):
        load(repo_root, "measure").Context(quick=False, results=tmp_path).compare({}, rounds=0)


def test_unknown_suite_is_bad_usage(repo_root: Path) -> None:
    command = [sys.executable, str(repo_root / "benchmarks" / "run.py"), "--suite", "no_such_suite"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no such suite" in done.stderr


def test_stamp_names_commit_machine_and_versions(repo_root: Path) -> None:
    found = stamp(repo_root)
    assert {"python", "torch"} < found["versions"].keys() and found["machine"]["cores"] >= 1 and "date" in found
    json.dumps(found, allow_nan=False)


def test_suites_have_a_run_function(repo_root: Path) -> None:
    run = load(repo_root, "run")
    for name in run.suites():
        text = (repo_root / "benchmarks" / "suites" / f"{name}.py").read_text(encoding="utf-8")
        assert "def run(context" in text, name


FAILING = """
def run(context):
    yield {"case": 1}
    yield {"case": 2}
    raise MemoryError("the third case is too large")
"""


@pytest.mark.parametrize("error", ["MemoryError", "KeyboardInterrupt"])
def test_rows_of_a_suite_that_fails_or_is_interrupted_are_kept(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: str
) -> None:
    run = load(repo_root, "run")
    (tmp_path / "failing.py").write_text(FAILING.replace("MemoryError", error), encoding="utf-8")
    monkeypatch.setattr(run, "SUITES", tmp_path)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    assert run.main(["--suite", "failing"]) == 1
    assert "the third case is too large" in capsys.readouterr().err
    (partial,) = (tmp_path / "results").iterdir()  # no name that report.py reads
    assert partial.name == "failing.json.partial"
    found = json.loads(partial.read_text(encoding="utf-8"))
    assert found["rows"] == [{"case": 1}, {"case": 2}] and error in found["failed"]


def test_suites_have_the_pages_of_the_engines_they_speak_for(repo_root: Path) -> None:
    run = load(repo_root, "run")
    assert run.load_suite("siblings").PAGE == PAGE_SIZE
    for name in ("gpu_siblings", "gpu_paged_prefill"):
        assert run.load_suite(name).PAGE == GPU_PAGE_SIZE


def test_a_suite_of_the_engine_on_a_gpu_shows_on_a_cpu_that_it_runs(repo_root: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("make gpu runs it")
    rows = load(repo_root, "run").run_suite("gpu_steps", quick=True)["rows"]
    assert len(rows) == 6 and all(row["ms"] > 0 for row in rows)


NEEDED = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not among what make gpu installs")
BLOCKED = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Blocked())
import pytest
assert pytest.main(["-q", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider", *sys.argv[2].split(",")]) == 0
sys.path.insert(0, "benchmarks")
import run
for name in run.suites():
    if name.startswith("gpu_"):
        run.load_suite(name)
"""


def test_make_gpu_needs_no_more_than_it_installs(repo_root: Path) -> None:
    """A CUDA machine may have no network, and an image with torch, Triton, pytest and hypothesis in it."""
    others = (
        "starlette",
        "pydantic",
        "uvicorn",
        "openai",
        "httpx",
        "datasets",
        "pyarrow",
        "peft",
        "wandb",
        "transformers",
    )
    pattern = re.search(r"GPU_TESTS \?= .* '(.*)' tests\)", (repo_root / "Makefile").read_text(encoding="utf-8"))
    texts = {str(path): path.read_text(encoding="utf-8") for path in (repo_root / "tests").rglob("test_*.py")}
    marked = [path for path, text in texts.items() if re.search(pattern[1], text, re.MULTILINE)]
    assert {*marked, __file__} == {path for path, text in texts.items() if "pytest.mark.gpu" in text}
    assert len(marked) > 5
    done = subprocess.run(
        [sys.executable, "-c", NEEDED, ",".join(others), ",".join(marked)],
        cwd=repo_root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
