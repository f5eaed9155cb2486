"""The shipped checkpoint and the shipped questions: complete, small, loadable by others, and answering."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from vtengine_training.eval.config import EvalConfig
from vtengine_training.eval.runner import _ask_all, evaluate, model_folder, summary
from vtengine_training.glance import KINDS, make_scene
from vtengine_training.glance.views import LIMITS, patches, plans
from vtengine_training.sft.loss import normalise

from vtengine.cli.models import shipped_model
from vtengine.model import PackedCausal, load_model, mrope_positions
from vtengine.protocol.profile import load_profile

SHIPPED, COLD_START, CROPPING = (shipped_model(name) for name in ("glance", "glance-sft", "glance-crop"))
EXAMPLES = Path(__file__).parents[2] / "examples" / "glance"
ROWS = [json.loads(line) for line in (EXAMPLES / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
needs_model = pytest.mark.skipif(
    not all((folder / "config.json").is_file() for folder in (SHIPPED, COLD_START, CROPPING)),
    reason="this source tree has no shipped models",
)


def test_questions_are_complete_and_balanced() -> None:
    assert len(ROWS) >= 64 and len({row["id"] for row in ROWS}) == len(ROWS)
    assert {row["kind"] for row in ROWS} == set(KINDS)
    assert 0.3 < sum(row["needs_high"] for row in ROWS) / len(ROWS) < 0.7
    assert all(set(row) == {"id", "image", "question", "answer", "kind", "needs_high"} for row in ROWS)


@pytest.mark.parametrize("row", ROWS[:7], ids=lambda row: row["kind"])
def test_questions_are_what_the_generator_makes(row: dict[str, str]) -> None:
    split, seed, number = row["id"].split("-")
    scene = make_scene(split, int(seed), int(number), row["kind"])
    assert np.array_equal(np.asarray(Image.open(EXAMPLES / row["image"])), scene.image)
    assert (row["question"], row["answer"]) in [(query.question, query.answer) for query in scene.queries]


@needs_model
@pytest.mark.parametrize("folder", [SHIPPED, COLD_START, CROPPING], ids=lambda folder: folder.name)
def test_the_checkpoint_is_small_and_whole(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 25e6
    assert load_profile(folder) == load_profile("glance-crop" if folder == CROPPING else "glance")
    limits = json.loads((folder / "preprocessor_config.json").read_text())
    assert (limits["min_pixels"], limits["max_pixels"]) == (LIMITS.min_pixels, LIMITS.max_pixels)


@needs_model
def test_transformers_loads_it_and_agrees() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHIPPED)
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(SHIPPED)  # the one that needs no torchvision
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(SHIPPED, dtype=torch.float32).eval()
    scene = make_scene("test", 0, 3)
    question = [{"type": "image"}, {"type": "text", "text": scene.queries[0].question}]
    messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    pixels = processor(images=[Image.fromarray(scene.image)], return_tensors="pt")
    grid = tuple(pixels["image_grid_thw"][0].tolist())
    ids = tokenizer(
        text.replace("<|image_pad|>", "<|image_pad|>" * (grid[1] * grid[2] // 4)), return_tensors="pt"
    ).input_ids
    mine = normalise(patches(scene, plans(scene)[1]))
    assert (pixels["pixel_values"].view(-1, 3, 2, 196)[:, :, 0].reshape(-1, 588) - mine).abs().max() < 1e-5
    model = load_model(SHIPPED)
    image = model.config.image_token_id
    kinds = (ids == image).int()
    with torch.inference_mode():
        expected = theirs(input_ids=ids, mm_token_type_ids=kinds, **pixels).logits[0]
        positions, _ = mrope_positions(ids[0], [grid], image_token_id=image)
        embeds = model.embed(ids[0], model.visual(mine, [grid]))
        found = model.logits(model.decode(embeds, positions, PackedCausal([0, ids.shape[1]])))
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5


@needs_model
@pytest.mark.parametrize(("resolution", "least"), [("high", 0.7), ("low", 0.25)])
def test_the_cold_start_answers_the_shipped_questions(resolution: str, least: float) -> None:
    found = asyncio.run(_ask_all(EvalConfig(), COLD_START, EXAMPLES, ROWS, resolution, lambda *_: None))
    result = summary(found)
    assert result["format_valid"] >= 0.98
    assert result["accuracy"]["all"] >= least


@needs_model
def test_the_shipped_model_looks_again_when_it_must() -> None:
    found = asyncio.run(_ask_all(EvalConfig(), SHIPPED, EXAMPLES, ROWS, "adaptive", lambda *_: None))
    needing, enough = ([row["upscaled"] for row in found if row["needs_high"] is need] for need in (True, False))
    assert sum(needing) / len(needing) >= 0.8
    assert sum(enough) / len(enough) <= 0.3
    assert summary(found)["accuracy"]["all"] >= 0.7


@needs_model
def test_the_model_that_crops_sees_enough_in_a_part() -> None:
    """It looks again when it must, at less than the whole, and reads as well."""
    config = EvalConfig(max_new_tokens=96)
    found = asyncio.run(_ask_all(config, CROPPING, EXAMPLES, ROWS, "adaptive", lambda *_: None))
    needing, enough = ([row["upscaled"] for row in found if row["needs_high"] is need] for need in (True, False))
    assert sum(needing) / len(needing) >= 0.9
    assert sum(enough) / len(enough) <= 0.15
    assert summary(found)["accuracy"]["all"] >= 0.8
    whole = asyncio.run(_ask_all(config, SHIPPED, EXAMPLES, ROWS, "adaptive", lambda *_: None))
    assert summary(found)["visual_tokens"] < 0.9 * summary(whole)["visual_tokens"]


@needs_model
def test_an_evaluation_of_a_few_questions() -> None:
    results = evaluate(EvalConfig(count=4, split="validation"), lambda *_: None)
    assert set(results["results"]) == {"low", "high", "adaptive"}
    assert all(0 <= found["accuracy"]["all"] <= 1 for found in results["results"].values())


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        model_folder(str(tmp_path))
