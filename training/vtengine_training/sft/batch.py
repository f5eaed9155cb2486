"""Batches by step number: a pure function of (seed, step), so a resumed run sees what an uninterrupted one sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vtengine.model.positions import mrope_positions
from vtengine.vision.plan import ViewPlan
from vtengine_training.glance import Query, Scene, guess, make_scene
from vtengine_training.glance.pages import make_page
from vtengine_training.glance.scene import KINDS
from vtengine_training.glance.supervision import answer_tokens, patch_labels
from vtengine_training.glance.views import patches, plans, query_needs_high
from vtengine_training.sft.config import DataConfig, PhaseConfig
from vtengine_training.sft.episodes import Renderer, Turn, assemble, pick_mode


@dataclass(frozen=True)
class Batch:
    """Packed arrays. P patches, V visual tokens shown, T text and image tokens, S sequences.

    pixels uint8 [P, 588]; grids (1, h, w) per encoded view; labels int16 [P, 4];
    ids int64 [T]; weights float32 [T]; positions int64 [3, T]; offsets int64 [S + 1];
    visual_rows int64 [V]: the encoded visual token behind each image token, in order. Text arrays are empty in a
    vision-only phase.
    look_from int64 [A]: places that predict an answer token whose position in the picture is known; look_query and
    look_token int64 [L]: pairs (number in look_from, place of an image token that shows this token).
    """

    pixels: np.ndarray
    grids: tuple[tuple[int, int, int], ...]
    labels: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    offsets: np.ndarray
    visual_rows: np.ndarray
    look_from: np.ndarray
    look_query: np.ndarray
    look_token: np.ndarray


Seen = dict[str, tuple[np.ndarray, ViewPlan, np.ndarray]]
"""View name -> (its rows among the encoded visual tokens, plan, labels): a scene's questions share its views."""


class Packer:
    """Collects views and sequences into one batch."""

    def __init__(self, image_token: int) -> None:
        self.image_token = image_token
        self.pixels: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.grids: list[tuple[int, int, int]] = []
        self.rows = 0
        self.ids: list[int] = []
        self.weights: list[float] = []
        self.positions: list[np.ndarray] = []
        self.offsets = [0]
        self.visual: list[np.ndarray] = []
        self.looks: list[int] = []
        self.pairs: list[tuple[int, int]] = []

    def view(self, scene: Scene, name: str) -> tuple[np.ndarray, ViewPlan, np.ndarray]:
        """Encode one view; returns the rows its visual tokens will have, its plan and its labels."""
        plan = plans(scene)[name == "high"]
        self.pixels.append(patches(scene, plan))
        labels = patch_labels(scene, plan).stack()
        self.labels.append(labels)
        self.grids.append(plan.grid_thw)
        rows = np.arange(self.rows, self.rows + plan.visual_tokens)
        self.rows += plan.visual_tokens
        return rows, plan, labels

    def add(self, scene: Scene, turns: tuple[Turn, ...], seen: Seen, query: Query | None = None) -> None:
        """Append one episode; views not in `seen` yet are encoded. `query`: its answer is true, and can be located."""
        names = [piece for turn in turns for piece in turn.prompt if isinstance(piece, str)]
        for name in names:
            if name not in seen:
                seen[name] = self.view(scene, name)
        sequence = assemble(turns, {n: len(seen[n][0]) for n in names}, self.image_token)  # type: ignore[misc]
        grids = [seen[name][1].grid_thw for name in sequence.views]
        positions, _ = mrope_positions(sequence.ids, grids, image_token_id=self.image_token)
        if query is not None:
            _, plan, labels = seen[sequence.views[-1]]
            shown = answer_tokens(scene, plan, labels, query)
            if len(shown) == sequence.answer[1] - sequence.answer[0]:
                for number, tokens in enumerate(shown):
                    if len(tokens):
                        first = self.offsets[-1] + sequence.starts[-1]
                        self.pairs += [(len(self.looks), first + int(token)) for token in tokens]
                        self.looks.append(self.offsets[-1] + sequence.answer[0] + number - 1)
        self.ids += sequence.ids
        self.weights += sequence.weights
        self.positions.append(positions.numpy())
        self.offsets.append(len(self.ids))
        self.visual += [seen[name][0] for name in sequence.views]

    def batch(self) -> Batch:
        """Everything so far."""
        return Batch(
            pixels=np.concatenate(self.pixels),
            grids=tuple(self.grids),
            labels=np.concatenate(self.labels),
            ids=np.array(self.ids, np.int64),
            weights=np.array(self.weights, np.float32),
            positions=np.concatenate(self.positions, 1) if self.positions else np.zeros((3, 0), np.int64),
            offsets=np.array(self.offsets, np.int64),
            look_from=np.array(self.looks, np.int64),
            look_query=np.array([query for query, _ in self.pairs], np.int64),
            look_token=np.array([token for _, token in self.pairs], np.int64),
            visual_rows=np.concatenate(self.visual) if self.visual else np.zeros(0, np.int64),
        )


def make_batch(renderer: Renderer, image_token: int, data: DataConfig, phase: PhaseConfig, step: int) -> Batch:
    """The batch of one step: `phase.scenes` pictures, each with up to `phase.questions` questions."""
    rng = np.random.default_rng([data.seed, 7, step])
    packer = Packer(image_token)
    kinds = drawn_kinds(data, phase, step)
    for index in range(phase.scenes):
        scene = make_scene("train", data.seed, step * 4096 + index, kinds[index])
        if phase.questions == 0:
            for name in ("low", "high"):
                if name == "high" or rng.random() < phase.low_share:
                    packer.view(scene, name)
            continue
        _add_questions(packer, rng, renderer, scene, data, phase)
    for index in range(phase.pages):
        page = make_page(data.seed, step * 4096 + index)
        packer.view(page, "high" if page.image.shape[0] < 200 else "low")
    return packer.batch()


def drawn_kinds(data: DataConfig, phase: PhaseConfig, step: int) -> list[str | None]:
    """The kind of each of the step's scenes; None leaves it to the scene's own number, which draws evenly."""
    if not phase.kinds:
        return [None] * phase.scenes
    weights = np.array([phase.kinds.get(kind, 1.0) for kind in KINDS])
    rng = np.random.default_rng([data.seed, 13, step])
    return [KINDS[int(i)] for i in rng.choice(len(KINDS), phase.scenes, p=weights / weights.sum())]


def _add_questions(
    packer: Packer, rng: np.random.Generator, renderer: Renderer, scene: Scene, data: DataConfig, phase: PhaseConfig
) -> None:
    seen: Seen = {}
    picked = rng.permutation(len(scene.queries))[: phase.questions]
    for query in (scene.queries[int(i)] for i in picked):
        mode = pick_mode(rng, {"low": phase.low_share, "high": phase.high_share}, data.call_share)
        is_blind = mode in ("low", "answer") and query_needs_high(scene, query)
        if is_blind and rng.random() >= phase.guess_share:
            mode, is_blind = "high" if mode == "low" else mode, mode != "low"
        answer = guess(rng, query) if is_blind else query.answer
        turns = renderer.episode(query.question, answer, mode, data.guess_weight if is_blind else 1.0)
        packer.add(scene, turns, seen, None if is_blind else query)
