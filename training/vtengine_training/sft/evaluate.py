"""Teacher-forced evaluation: how many answers are right in every token, by kind, view and whether the view suffices.

Given the true answer so far, the arg-max of each next token; all right means greedy decoding gives this answer, once
it has begun to answer. Cheap enough to run while training; `vtengine-train eval` decodes for real.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from vtengine.model import PackedCausal, VLModel
from vtengine_training.glance import Query, Scene, make_scene
from vtengine_training.glance.views import query_needs_high
from vtengine_training.sft.batch import Batch, Packer, Seen
from vtengine_training.sft.episodes import Mode, Renderer
from vtengine_training.sft.loss import vision

CHUNK = 32
ANSWER = 0.5
"""Weight that marks the answer's own tokens in an evaluation batch."""


@dataclass(frozen=True)
class Asked:
    """One question put to the model in one mode."""

    scene: Scene
    query: Query
    needs_high: bool


def questions(split: str, seed: int, count: int) -> list[Asked]:
    """`count` scenes of a split, one random question each."""
    asked = []
    for index in range(count):
        scene = make_scene(split, seed, index)
        pick = np.random.default_rng([seed, 11, index]).integers(len(scene.queries))
        query = scene.queries[int(pick)]
        asked.append(Asked(scene, query, query_needs_high(scene, query)))
    return asked


@torch.inference_mode()
def forced_accuracy(model: VLModel, renderer: Renderer, asked: list[Asked], image_token: int) -> dict[str, float]:
    """Shares of right answers: `high/all`, `high/<kind>`, `low/enough`, `low/needs_high`, `two/all`, and so on."""
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(asked), CHUNK):
        chunk = asked[start : start + CHUNK]
        for mode, names in (("high", "high"), ("low", "low"), ("call", "two")):
            packer = Packer(image_token)
            for one in chunk:
                seen: Seen = {}
                packer.add(one.scene, renderer.episode(one.query.question, one.query.answer, _mode(mode), ANSWER), seen)
            for one, (answer_right, rest_right) in zip(chunk, _right(model, packer.batch()), strict=True):
                part = "needs_high" if one.needs_high else "enough"
                keys = [f"{names}/{part}"] + ([f"low/{one.scene.kind}"] if mode == "low" and not one.needs_high else [])
                keys += [] if mode == "low" else [f"{names}/all", f"{names}/{one.scene.kind}"]
                for key in keys:
                    right[key].append(answer_right)
                if mode != "call":  # an adaptive episode may rightly do the other thing
                    right["format"].append(rest_right)
    return {key: float(np.mean(values)) for key, values in sorted(right.items())}


def _mode(name: str) -> Mode:
    return name  # type: ignore[return-value]


def _right(model: VLModel, batch: Batch) -> Iterator[tuple[bool, bool]]:
    """(all answer tokens right, all other reply tokens right) of each sequence."""
    features = vision(model, batch).index_select(0, torch.from_numpy(batch.visual_rows))
    ids = torch.from_numpy(batch.ids)
    hidden = model.decode(
        model.embed(ids, features), torch.from_numpy(batch.positions), PackedCausal(batch.offsets.tolist())
    )
    taught = np.flatnonzero(batch.weights)
    best = model.logits(hidden[torch.from_numpy(taught - 1)]).argmax(1).numpy()
    hit = np.ones(len(batch.ids), bool)
    hit[taught] = best == batch.ids[taught]
    is_answer = batch.weights == np.float32(ANSWER)
    for begin, end in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
        span = slice(int(begin), int(end))
        yield bool(hit[span][is_answer[span]].all()), bool(hit[span][~is_answer[span]].all())
