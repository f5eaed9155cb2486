"""GRPO of two ranks under torchrun over two real SGLang servers: python -m tests.engine.sglang.several_ranks FOLDER

First with weights by broadcast, then by disk, where a server is killed after the first step. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

from vtengine_training.rewards.penalty import PenaltyConfig

from tests.engine.sglang import learn, real
from vtengine.config import to_toml

REPO = Path(__file__).resolve().parents[3]
STEPS = 3
LIMIT_S = 400


def config(folder, urls, sync):
    base = learn.config(folder, ",".join(urls), sync=sync)
    reward = replace(base.reward, accuracy="function", function="toy_reward:low_bytes", penalty=PenaltyConfig("off"))
    return replace(base, output=str(folder / sync), steps=STEPS, reward=reward, rank_timeout_s=300)


def train(folder, urls, sync, after_a_step=lambda: None):
    """The rows of its metrics."""
    path = folder / f"{sync}.toml"
    path.write_text(to_toml(config(folder, urls, sync)))
    paths = [str(REPO / part) for part in ("", "kernels", "training", "tests/training/trainer")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "vtengine_training.cli", "grpo", str(path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    metrics = folder / sync / "metrics.jsonl"
    with subprocess.Popen(command, env=environment, stdout=sys.stderr) as run:
        until = time.monotonic() + LIMIT_S
        while run.poll() is None and not (metrics.is_file() and metrics.read_text()) and time.monotonic() < until:
            time.sleep(0.2)
        after_a_step()
        status = run.wait(timeout=LIMIT_S)
    assert status == 0, status
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    names = ("reward/mean", "mismatch/max", "version", "staleness/mean", "groups/used", "groups/failed")
    return {name: [row[name] for row in rows] for name in names}


def weight_version(url):
    with urllib.request.urlopen(f"{url}/model_info", timeout=30) as answer:
        return json.load(answer)["weight_version"]


def main(folder):
    (folder / "model").mkdir()
    real.write_toy_checkpoint(folder / "model")
    learn.write_questions(folder, 8)
    with real.servers(folder / "model", 2) as servers:
        urls = [url for url, _ in servers]
        report = {"distributed": train(folder, urls, "distributed")}
        report["versions"] = [weight_version(url) for url in urls]
        victim = servers[1][1]
        report["disk"] = train(folder, urls, "disk", lambda: os.killpg(victim.pid, signal.SIGKILL))
        report["versions"].append(weight_version(urls[0]))
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
