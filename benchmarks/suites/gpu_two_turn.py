"""Two turns at the sizes of Qwen2.5-VL on one GPU, resumed and not, and decode attention against flash-attn.

Random weights (bfloat16) and made-up pixels: what is measured is the engine's work. Each of the pictures is asked about
by 16 siblings: turn 1 shows 1,024 visual tokens, turn 2 appends 4,096. `--quick` runs a small model, also on the CPU.
"""

from __future__ import annotations

import asyncio
import importlib.util
import statistics
import time
from typing import Any

import torch
from vtengine_kernels.prefix_attention import prefix_attention

from vtengine.engine.base import Completion, ImageInput, Request, SamplingParams
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.model import ModelConfig, Qwen2_5_VL, TextConfig, VisionConfig

TESTS = ["-m", "gpu", "tests/engine/embedded/test_attention_paths.py"]
PICTURES, SIBLINGS, ROUNDS = 2, 16, 3
LOW_SIDE, HIGH_SIDE = 64, 128  # patches: 1,024 and 4,096 visual tokens
TEXT_TOKENS, NEW_TOKENS = 64, 32
PAD = 151655
BATCHES, LENGTHS = (8, 16, 32, 64, 128, 256), (1024, 4096)
_SMALL = {"hidden_size": 256, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 256}
SHAPES = {
    "3B": {"hidden_size": 2048, "num_layers": 36, "num_heads": 16, "num_kv_heads": 2, "intermediate_size": 11008},
    "7B": {"hidden_size": 3584, "num_layers": 28, "num_heads": 28, "num_kv_heads": 4, "intermediate_size": 18944},
}
TABLES = {
    "gpu-two-turn": {
        "columns": {
            "model": "Model",
            "resumption": "Resumption",
            "episodes_per_s": "Episodes/s",
            "ttft_turn2_ms": "First token of turn 2, ms",
            "prefill_tokens": "Tokens prefilled",
            "images_encoded": "Images encoded",
        },
        "where": {"part": "two_turn"},
    },
    "gpu-decode-attention": {
        "columns": {"batch": "Batch", "length": "Context", "impl": "Kernel", "us": "µs"},
        "where": {"part": "decode"},
    },
}


def run(context: Any) -> list[dict[str, Any]]:
    if not torch.cuda.is_available() and not context.quick:
        raise RuntimeError("this suite needs a CUDA device; --quick shows on the CPU that it runs")
    rows = []
    for name, sizes in ({"small": _SMALL} if context.quick else SHAPES).items():
        rows += _two_turn(name, _model(sizes), context.quick)
    return rows + (_decode(context) if torch.cuda.is_available() else [])


def _model(sizes: dict[str, int]) -> Qwen2_5_VL:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    vision = {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "fullatt_block_indexes": (1,)}
    vision = {"out_hidden_size": sizes["hidden_size"]} | (vision if sizes is _SMALL else {})
    config = ModelConfig(
        text=TextConfig(vocab_size=151936, **sizes), vision=VisionConfig(**vision), image_token_id=PAD,
        video_token_id=PAD + 1, vision_start_token_id=PAD - 3, vision_end_token_id=PAD - 2, eos_token_id=PAD - 10,
        bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2_5_VL(config)
    model = model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
            else:
                parameter.fill_(1.0)
    return model.eval()


class _NoText:
    """The engine asks for text only where there are stop strings."""

    def decode(self, token_ids: object) -> str:
        return ""


def _two_turn(name: str, model: Qwen2_5_VL, quick: bool) -> list[dict[str, Any]]:
    rounds, siblings = (1, 2) if quick else (ROUNDS, SIBLINGS)
    sides = (8, 16) if quick else (LOW_SIDE, HIGH_SIDE)
    rows = []
    for resume in (True, False):
        runs = asyncio.run(_rounds(model, resume, rounds, siblings, sides))
        later = [second.ttft_s for _, episodes in runs for _, second in episodes]
        last = [turn for episode in runs[-1][1] for turn in episode]
        rows.append(
            {
                "part": "two_turn",
                "model": name,
                "resumption": "on" if resume else "off",
                "episodes": PICTURES * siblings,
                "rounds": rounds,
                "episodes_per_s": PICTURES * siblings / statistics.median(wall_s for wall_s, _ in runs),
                "ttft_turn2_ms": 1e3 * statistics.median(later),
                "prompt_tokens": sum(turn.prompt_tokens for turn in last),
                "prefill_tokens": sum(turn.prefill_tokens for turn in last),
                "images_encoded": sum(sum(turn.images_encoded) for turn in last),
            }
        )
    return rows


async def _rounds(
    model: Qwen2_5_VL, resume: bool, rounds: int, siblings: int, sides: tuple[int, int]
) -> list[tuple[float, list[tuple[Completion, Completion]]]]:
    """(seconds, both turns of every episode) of each round, which all show other pictures.

    One engine does them all, after a round that is not counted: in it kernels are compiled and graphs captured.
    """
    tokens = sum(side**2 // 4 for side in sides) + 2 * (TEXT_TOKENS + NEW_TOKENS)
    pages = PICTURES * siblings * (tokens // 16 + 2)
    config = EngineConfig(num_pages=pages, max_running=PICTURES * siblings, max_batch_tokens=8192, resume=resume)
    engine = EmbeddedEngine(model, _NoText(), config)
    runs = []
    try:
        for number in range(rounds + 1):
            jobs = [(number * PICTURES + p, s) for p in range(PICTURES) for s in range(siblings)]
            started_s = time.perf_counter()
            done = await asyncio.gather(*(_episode(engine, picture, sibling, sides) for picture, sibling in jobs))
            runs.append((time.perf_counter() - started_s, list(done)))
    finally:
        await engine.close()
    return runs[1:]


async def _episode(
    engine: EmbeddedEngine, picture: int, sibling: int, sides: tuple[int, int]
) -> tuple[Completion, Completion]:
    images = [_image(picture, side, engine.model) for side in sides]
    text = [(31 * picture + index) % 1000 for index in range(TEXT_TOKENS)]
    ids = [*text, *[PAD] * images[0].visual_tokens]
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=1.0, seed=sibling)
    first = await engine.generate(Request(f"{picture}.{sibling}/0", tuple(ids), tuple(images[:1]), sampling))
    ids += [*first.token_ids, *[PAD] * images[1].visual_tokens, *text]
    second = await engine.generate(Request(f"{picture}.{sibling}/1", tuple(ids), tuple(images), sampling))
    return first, second


def _image(picture: int, side: int, model: Qwen2_5_VL) -> ImageInput:
    generator = torch.Generator().manual_seed(1000 * picture + side)
    pixels = torch.randn(side * side, 588, generator=generator).to(model.dtype)
    return ImageInput(f"picture-{picture}-{side}", (1, side, side), pixels)


def _decode(context: Any) -> list[dict[str, Any]]:
    """One query per row, 28:4 heads of 128: our kernel on pages of 16, flash-attn, if installed, on pages of 256."""
    rows = []
    for length in LENGTHS[:1] if context.quick else LENGTHS:
        for batch in BATCHES[:2] if context.quick else BATCHES:
            candidates = {"vtengine": _ours(batch, length)}
            if importlib.util.find_spec("flash_attn") is not None:
                candidates["flash-attn"] = _flash(batch, length)
            timed = context.compare(candidates, min_round_s=0.05, warmup=3, after=torch.cuda.synchronize)
            for name, measured in timed.items():
                row = {"part": "decode", "batch": batch, "length": length, "impl": name}
                rows.append({**row, "us": 1e6 * measured.median_s})
    return rows


def _paged(batch: int, length: int, page: int) -> tuple[torch.Tensor, ...]:
    """(q, keys, values, tables, lengths) on the GPU."""
    per_row = length // page
    q = torch.randn(batch, 28, 128, device="cuda", dtype=torch.bfloat16)
    keys, values = (torch.randn(batch * per_row, page, 4, 128, device="cuda", dtype=q.dtype) for _ in range(2))
    tables = torch.randperm(batch * per_row, device="cuda").view(batch, per_row)
    return q, keys, values, tables, torch.full((batch,), length, device="cuda")


def _ours(batch: int, length: int) -> Any:
    q, keys, values, tables, lengths = _paged(batch, length, 16)
    return lambda: prefix_attention(q, keys, values, tables, lengths, impl="triton")


def _flash(batch: int, length: int) -> Any:
    from flash_attn import flash_attn_with_kvcache

    q, keys, values, tables, lengths = _paged(batch, length, 256)
    q, tables, lengths = q.unsqueeze(1), tables.int(), lengths.int()
    return lambda: flash_attn_with_kvcache(q, keys, values, cache_seqlens=lengths, block_table=tables, causal=True)
