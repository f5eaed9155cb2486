"""What a checkpoint of a run holds, written and read. Tensors as safetensors, the rest as JSON: nothing is unpickled.

model/        a Hugging Face checkpoint; where adapters learn, adapter/ as peft reads it, and no copy of their base
optimizer/    masters and moments, in one piece per rank
state.json    what all ranks have in common
ranks/R/      leftover groups and rewarder of rank R, and the groups it sampled ahead

Random states are not among it: every draw follows from the seed and what it is for, the global generators' from the
seed, the step and the rank (`seed_generators`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vtengine.config import flat, to_dict
from vtengine_training.data.sampler import Sampler
from vtengine_training.lora.adapters import save_adapter
from vtengine_training.lora.config import LoraConfig
from vtengine_training.trainer.checkpoint import (
    CheckpointError,
    Sealed,
    files_below,
    find_latest,
    seal,
    step_name,
    write_checkpoint,
)
from vtengine_training.trainer.collect import Collected
from vtengine_training.trainer.export import export_model
from vtengine_training.trainer.optimizer_state import load_optimizer, save_optimizer
from vtengine_training.trainer.rollouts import Sampled
from vtengine_training.trainer.trajectory import Group, pack_groups, unpack_groups

if TYPE_CHECKING:
    from vtengine.model import VLModel
    from vtengine_training.trainer.config import GrpoConfig
    from vtengine_training.trainer.loop import Run


FILES = {"leftover": "rollouts.safetensors", "waiting": "ahead.safetensors"}
"""Of the groups of one rank, by what they are."""


def save(run: Run) -> None:
    """A checkpoint of the step that the run is at, by all ranks into one folder that they share.

    Raises OSError, on every rank, if one of them could not write; older checkpoints are then as they were.
    """
    ranks, failure, asked = run.ranks, "", False

    def write(folder: Path) -> Sealed:
        nonlocal asked
        asked = True
        ranks.first(str(folder))
        return _write_all(run, folder)

    if not ranks.is_first:
        if folder := ranks.first():
            _write_all(run, Path(folder), raises=False)
        if failure := ranks.first():
            raise OSError(failure)
        return
    try:
        write_checkpoint(run.checkpoints, run.step, write, run.config.checkpoint.keep)
    except OSError as error:
        place = run.checkpoints / step_name(run.step)
        failure = f"{place}: cannot be written: {error}; older checkpoints stay; make room, and run the same command"
        if not asked:
            ranks.first("")
        raise OSError(failure) from error
    finally:
        ranks.first(failure)


def _write_all(run: Run, folder: Path, raises: bool = True) -> Sealed:
    """Every rank its part, which it also seals. Raises OSError where one failed."""
    adapters = run.parts.adapters
    adapter = None if adapters is None else adapters.tensors()
    whole = run.parts.models.whole(run.ranks, run.parts.folder) if adapters is None else None
    errors: list[str] = []
    own: Sealed = {}
    for part in (partial(save_optimizer, run.parts.learner.optimizer, folder / "optimizer", run.ranks),
                 partial(_write_own, run, folder, whole, adapter),
                 lambda: own.update(_seal_own(folder, run.ranks.rank))):  # fmt: skip
        try:
            part()
        except (OSError, SafetensorError) as error:
            errors.append(str(error))
    everywhere = run.ranks.gather([errors, own])
    failures = [error for errors, _ in everywhere for error in errors]
    if failures and raises:
        raise OSError("; ".join(failures))
    return {name: facts for _, sealed in everywhere for name, facts in sealed.items()}


def _seal_own(folder: Path, rank: int) -> Sealed:
    """What this rank has written is in its own machine's memory still."""
    return seal(folder, [name for name in files_below(folder) if writer(name) == rank])


def writer(name: str) -> int:
    """The rank that writes a file of a checkpoint: the first one, if it is not one rank's own."""
    if found := re.match(r"ranks/(\d+)/", name):
        return int(found[1])
    if found := re.match(r"optimizer/shard-(\d+)-", name):
        return int(found[1]) - 1  # torch counts from 1
    return 0


def _write_own(run: Run, folder: Path, whole: VLModel | None, adapter: dict[str, Tensor] | None) -> None:
    """This rank's files; the first one also writes what exists once."""
    parts, own = run.parts, folder / "ranks" / str(run.ranks.rank)
    own.mkdir(parents=True)
    waiting = run.rollouts.waiting
    of_rank: dict[str, Any] = {"rewarder": parts.rewarder.state()}
    tensors, of_rank["leftover"] = pack_groups(parts.collector.leftover)
    save_file(tensors, own / FILES["leftover"])
    if waiting is not None:
        tensors, of_rank["waiting"] = pack_groups(waiting.collected.groups)
        save_file(tensors, own / FILES["waiting"])
    (own / "state.json").write_text(json.dumps(of_rank), encoding="utf-8")
    if not run.ranks.is_first:
        return
    if parts.adapters is not None and adapter is not None:
        save_adapter(adapter, parts.adapters, parts.folder, folder / "adapter")
    elif whole is not None:
        export_model(whole, parts, folder / "model")
    state = {
        "step": run.step,
        "ranks": run.ranks.size,
        "version": parts.learner.version,
        "skipped": parts.learner.skipped,
        "empty_steps": run.empty_steps,
        "sampler": parts.collector.sampler.state(),
        "waiting": None if waiting is None else _described(waiting),
        "fingerprints": run.fingerprints,
        "data_seed": run.config.data.seed,
        "seed": run.config.seed,
        "config": asdict(run.config),
    }
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")


def resume(run: Run) -> bool:
    """Goes on from the newest checkpoint, if there is one. Raises CheckpointError where it cannot.

    The number of ranks may have changed: the optimiser's pieces are cut anew, and leftover groups go to the ranks that
    now own their draws.
    """
    folder = _latest(run)
    if folder is None:
        return False
    if run.config.resume == "never":
        raise CheckpointError(
            f'output = {run.output}: holds {folder.name}, and resume = "never"; use another output, or delete it'
        )
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    _check_state(run, folder, state)
    run.changes = find_changes(state["config"], run.config)
    parts, config = run.parts, run.config
    load_optimizer(parts.learner.optimizer, folder / "optimizer", run.ranks)
    parts.learner.version, parts.learner.skipped = state["version"], state["skipped"]
    parts.collector.sampler = Sampler.restore(len(parts.dataset), config.data.seed, state["sampler"])
    run.step, run.empty_steps = state["step"], state["empty_steps"]
    parts.collector.leftover, ahead = [], []
    for rank in range(state["ranks"]):
        own = folder / "ranks" / str(rank)
        of_rank = json.loads((own / "state.json").read_text(encoding="utf-8"))
        parts.collector.leftover += _owned(run, own, "leftover", of_rank)
        ahead += _owned(run, own, "waiting", of_rank)
        parts.rewarder.restore(of_rank["rewarder"], counts=run.ranks.owns(rank))
    parts.collector.leftover.sort(key=lambda group: group.draw)
    if waiting := state.get("waiting"):
        groups = sorted(ahead, key=lambda group: group.draw)
        collected = Collected(groups, Counter(waiting["counts"]), rows=waiting["rows"])
        run.rollouts.waiting = Sampled(collected, waiting["figures"])
    return True


def _described(waiting: Sampled) -> dict[str, Any]:
    """What all ranks have in common of it, and is still needed; plain JSON data."""
    return {"counts": waiting.collected.counts, "rows": waiting.collected.rows, "figures": waiting.figures}


def _latest(run: Run) -> Path | None:
    """The first rank looks: files are hashed, and once is enough. Raises ValueError, on all, if none is whole."""
    path = run.ranks.from_first(lambda: str(find_latest(run.checkpoints) or ""))
    return Path(path) if path else None


def _owned(run: Run, folder: Path, name: str, state: Mapping[str, Any]) -> list[Group]:
    described = state.get(name, [])
    if not any(run.ranks.owns(group["draw"]) for group in described):
        return []
    groups = unpack_groups(load_file(folder / FILES[name]), described)
    return [group for group in groups if run.ranks.owns(group.draw)]


def find_changes(saved: Mapping[str, Any], config: GrpoConfig) -> list[str]:
    """What a run that goes on does otherwise than the one that saved: `field = value (was value)`.

    All that `_check_state` does not compare may differ, engine arguments too: a run goes on at another rate, on another
    machine, with less memory. saved: the config in its `state.json`.
    """
    before, now = flat(saved), flat(json.loads(json.dumps(asdict(config))))
    names = [name for name in (now | before) if name != "output" and before.get(name) != now.get(name)]
    return [f"{name} = {_shown(now.get(name))} (was {_shown(before.get(name))})" for name in names]


def _shown(value: Any) -> str:
    return "left out" if value is None else json.dumps(value)


def _check_state(run: Run, folder: Path, state: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a checkpoint of another model, data set or order."""
    remedies = {
        "data": "the examples have changed since",
        "model": "it was trained from other weights",
    }
    if "ranks" not in state:
        raise CheckpointError(f"{folder}: has an older layout; begin anew from {folder / 'model'} with another output")
    for name, reason in remedies.items():
        if state["fingerprints"][name] != run.fingerprints[name]:
            raise CheckpointError(f"{folder}: {reason}; give them back, or use another output")
    algorithm, now = state["config"]["loss"]["algorithm"], run.config.loss.algorithm
    if (algorithm == "sft") != (now == "sft"):  # the log-probabilities of written replies that wait mean nothing
        raise CheckpointError(
            f"{folder}: was made with loss.algorithm = {algorithm}, not {now}: a cold start is a run of its own; "
            f"use another output (with model = {run.output / 'model'}, to begin with what this run ends with)"
        )
    saved, wanted = state["config"].get("lora", to_dict(LoraConfig())), to_dict(run.config.lora)
    if saved != wanted:
        changed = [
            f"lora.{name} = {saved.get(name)}, not {value}"
            for name, value in wanted.items()
            if saved.get(name) != value
        ]
        raise CheckpointError(f"{folder}: was made with {', '.join(changed)}; give it back, or use another output")
    for name, value in (("data_seed", run.config.data.seed), ("seed", run.config.seed)):
        if state[name] != value:
            field = name.replace("_", ".")
            raise CheckpointError(f"{folder}: was made with {field} = {state[name]}, not {value}; use another output")
