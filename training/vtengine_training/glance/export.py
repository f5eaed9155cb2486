"""Questions as files: PNG images and a `questions.jsonl` that `vtengine generate` reads.

    python -m vtengine_training.glance.export FOLDER --split test --seed 0 --count 64

Kinds take turns, and so do questions that the low view answers and questions that need the high view, where the kind
has both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vtengine.protocol.messages import View
from vtengine.protocol.profile import Profile, load_profile
from vtengine.protocol.tools import CROP, ToolCall
from vtengine_training.glance.generate import SPLITS, make_scene
from vtengine_training.glance.regions import region
from vtengine_training.glance.scene import KINDS, Query, Scene
from vtengine_training.glance.views import plans, query_needs_high
from vtengine_training.sft.tokenizer import THINK_FIRST, THINK_LARGE


def pick(split: str, seed: int, count: int, balanced: bool) -> list[tuple[int, Scene, Query, bool]]:
    """(scene number, scene, query, needs_high). Unbalanced: kinds and questions as the generator draws them."""
    chosen: list[tuple[int, Scene, Query, bool]] = []
    index = 0
    while len(chosen) < count:
        place = len(chosen)
        scene = make_scene(split, seed, index, KINDS[place % len(KINDS)] if balanced else None)
        order = np.random.default_rng([SPLITS.index(split), seed, 11, index]).permutation(len(scene.queries))
        wanted = place // len(KINDS) % 2 == 1 if balanced else None
        for query in (scene.queries[int(i)] for i in order):
            needs = query_needs_high(scene, query)
            if wanted is None or needs == wanted:
                chosen.append((index, scene, query, needs))
                break
        index += 1
    return chosen


def write_questions(
    folder: Path, split: str, seed: int, count: int, balanced: bool = True, crops: bool = False
) -> list[dict[str, Any]]:
    """Writes images/ and questions.jsonl under `folder`; returns the rows.

    crops: rows that need the high view get the `replies` of a model that asks for a part of it (profile glance-crop).
    """
    profile = load_profile("glance-crop")
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for index, scene, query, needs in pick(split, seed, count, balanced):
        name = f"{split}-{seed}-{index:05d}"
        Image.fromarray(scene.image).save(images / f"{name}.png", optimize=True)
        rows.append(
            {
                "id": name,
                "image": f"images/{name}.png",
                "question": query.question,
                "answer": query.answer,
                "kind": scene.kind,
                "needs_high": needs,
            }
        )
        if crops and needs:
            rows[-1]["replies"] = cropping(scene, query, profile)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")
    return rows


def cropping(scene: Scene, query: Query, profile: Profile) -> list[str]:
    """The two replies, in the words of the profile."""
    low, _ = plans(scene)
    call = ToolCall(CROP, View("crop", box=region(scene, query, low)))
    return [profile.reply_call(THINK_FIRST, call), profile.reply_answer(THINK_LARGE, query.answer)]


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description="write generated questions and their pictures")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=64)
    arguments = parser.parse_args()
    rows = write_questions(arguments.folder, arguments.split, arguments.seed, arguments.count)
    print(f"{arguments.folder}: {len(rows)} questions, {sum(row['needs_high'] for row in rows)} need the high view")


if __name__ == "__main__":
    main()
