"""One of several ranks, started by the tests. A case is a line of its input: ["CONFIG.toml", "OUT", "gradients"], or
curve-3, skipped, ...; each is answered with a line `done`. The end of the input is the end of the meetings."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from vtengine_training.sync import gathered as gathered_weights
from vtengine_training.sync.gathered import gathered
from vtengine_training.trainer import optimizer_state, state
from vtengine_training.trainer.command import train
from vtengine_training.trainer.config import GrpoConfig
from vtengine_training.trainer.figures import StepFigures
from vtengine_training.trainer.loop import Run
from vtengine_training.trainer.ranks import Ranks
from vtengine_training.trainer.trajectory import Trajectory

from tests.training.trainer.probe import collect, probe
from tests.training.trainer.toy import rewarder
from vtengine.config import load_config


def text_only(one: Trajectory) -> Trajectory:
    """Without its images, as if they had never been shown."""
    keep = np.ones(len(one), dtype=bool)
    for span in one.images:
        keep[span.start : span.end] = False
    arrays = {name: getattr(one, name)[keep] for name in ("token_ids", "trainable", "logprobs")}
    return replace(one, **arrays, positions=one.positions[:, torch.from_numpy(keep)], images=())


def gradients(run: Run, max_tokens: tuple[int, ...], what: str = "") -> dict[str, torch.Tensor]:
    """loss.M and M.NAME: loss and whole gradients of one mini-batch cut at M tokens. what: "blind": the draws of rank 0
    of 2 have no images; "uneven": all that count are its own, and tokens.M [ranks] are packed tokens."""
    found: dict[str, torch.Tensor] = {}
    groups = collect(run)
    if what == "uneven":
        groups = [group for group in groups if group.draw % 2 == 0]
    if what == "blind":
        groups = [
            group if group.draw % 2 else replace(group, trajectories=tuple(map(text_only, group.trajectories)))
            for group in groups
        ]
    for bound in max_tokens:
        learner = probe(run, max_tokens=bound)
        minibatch = learner.cutter.whole(groups)
        if what == "uneven":
            tokens = sum(len(batch.token_ids) for batch in minibatch.batches[: minibatch.num_own])
            found[f"tokens.{bound}"] = torch.tensor(run.ranks.gather(tokens))
        loss = run.ranks.sum(learner.backward(minibatch, StepFigures()))
        found[f"loss.{bound}"] = torch.tensor([loss], dtype=torch.float64)
        for name, parameter in learner.policy.model.named_parameters():
            if parameter.grad is not None:
                found[f"{bound}.{name}"] = gathered(parameter.grad, torch.float32)
    asyncio.run(run.close())
    return found


def sums_over_copies(run: Run, max_tokens: tuple[int, ...]) -> list[list[int]]:
    """[micro-batches, sums over the copies of the weights] of one mini-batch, for each bound on the tokens."""
    found, groups = [], collect(run)
    for bound in max_tokens:
        learner = probe(run, max_tokens=bound)
        minibatch = learner.cutter.whole(groups)
        with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as summed:
            learner.backward(minibatch, StepFigures())
        found.append([len(minibatch.batches), summed.call_count])
    asyncio.run(run.close())
    return found


def curve(run: Run, stop: int) -> list[dict[str, float]]:
    """The metrics of a run until after step `stop`, from where it is."""
    rows: list[dict[str, float]] = []
    run.resume()

    def report(figures: dict[str, float]) -> None:
        rows.append(figures)
        run.stop_requested = figures["step"] >= stop

    asyncio.run(train(run, report))
    return rows


def skipped(run: Run) -> list[float]:
    """A step in which one rank's rewards are broken: [updates skipped, largest change of a weight], of each rank."""
    learner = run.parts.learner
    groups = collect(run)
    before = {name: p.detach().clone() for name, p in learner.policy.model.named_parameters()}
    if run.ranks.is_first:
        broken = [replace(one, advantage=float("nan")) for one in groups[0].trajectories]
        groups[0] = replace(groups[0], trajectories=tuple(broken))
    figures = learner.learn(groups, 1e-3)
    change = max(float((gathered(p - before[name], torch.float32)).abs().max()) for name, p in
                 learner.policy.model.named_parameters())  # fmt: skip
    asyncio.run(run.close())
    return [figures["updates/skipped"], change]


def sealed(run: Run) -> list[str]:
    """The files of a checkpoint that this rank flushed and hashed."""
    with patch.object(state, "seal", wraps=state.seal) as sealing:
        run.save()
    asyncio.run(run.close())
    names: list[str] = sealing.call_args.args[1]
    return names


def do(config: GrpoConfig, ranks: Ranks, out: Path, what: str) -> None:
    torch.manual_seed(0)  # whatever case came before
    run = Run(config, rewarder(), ranks)
    if what.startswith("gradients"):
        tensors = gradients(run, (1, 200, 10**6), what.partition("-")[2])
        if ranks.is_first:
            save_file(tensors, out)
    elif what == "sums-over-copies":
        counted = sums_over_copies(run, (1, 10**6))
        if ranks.is_first:
            out.write_text(json.dumps(counted))
    elif what.startswith("curve"):
        rows = curve(run, int(what.partition("-")[2]))
        if ranks.is_first:
            out.write_text(json.dumps(rows))
    elif what == "skipped":
        found = ranks.gather(skipped(run))
        if ranks.is_first:
            out.write_text(json.dumps(found))
    elif what == "sealed":
        names = ranks.gather(sealed(run))
        if ranks.is_first:
            out.write_text(json.dumps(names))


def main() -> None:
    torch.set_num_threads(1)
    gathered_weights.PART_BYTES = optimizer_state.FILE_BYTES = 20_000  # a toy model in several parts too
    ranks = Ranks.join(torch.device("cpu"))
    for line in sys.stdin:
        config, out, what = json.loads(line)
        do(load_config(GrpoConfig, Path(config), []), ranks, Path(out), what)
        print("done", flush=True)
    ranks.leave()


if __name__ == "__main__":
    main()
