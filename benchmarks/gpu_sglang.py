"""Two turns through SGLang on a GPU, with resumption and without: `make gpu-sglang`, JSON out.

A model of the size of Qwen2.5-VL-7B with random weights (or of `--config FOLDER_OR_JSON`), so nothing is downloaded.
Each prompt shows an image of about 1,000 visual tokens to n = 16 siblings; every sibling is then shown the same image
at about 4,000 and goes on. Each side has an engine and a process of its own. Needs torch and sglang alone, also from a
folder on PYTHONPATH on a machine without a network; without a GPU or without SGLang it says what it skips.

    python benchmarks/gpu_sglang.py --attention-backend fa3 --prompts 16 -o result.json
    python benchmarks/gpu_sglang.py --dry-run        the same path with a tiny model, on the CPU if need be
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtengine.engine.base import Backend, Completion, ImageInput

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
SPECIAL = ("<|image_pad|>", "<|video_pad|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>")
VISION = {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
VISION |= {"in_chans": 3, "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112}
VISION |= {"spatial_patch_size": 14, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2}
SEVEN_B: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 152064,
    "vision_config": VISION | {"temporal_patch_size": 2},
}
TINY: dict[str, Any] = {  # on a GPU, SGLang's rotary kernels have head sizes from 64 on
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
}  # fmt: skip
TINY_VISION = {"depth": 2, "hidden_size": 128, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 256}
TINY_VISION |= {"fullatt_block_indexes": [1]}
COMPILING_S = 1800.0  # the first requests wait for kernels that are compiled on the spot
TEXT_TOKENS = 128  # before the image, and about as many after it


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.side is not None:
        return asyncio.run(measure(args))
    missing = skipped(args.dry_run)
    if missing:
        print(f"make gpu-sglang: {missing}. Skipped: two turns through SGLang with and without resumption.")
        return 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="sglang-") as folder:
        write_model(Path(folder), args.config, args.dry_run)
        for side in ("on", "off"):
            out = Path(folder) / f"{side}.json"
            line = [sys.executable, __file__, *(argv if argv is not None else sys.argv[1:])]
            done = subprocess.run([*line, "--side", side, "--model", folder, "-o", str(out)], check=False)
            if not out.is_file():
                print(f"resumption {side}: the engine ended with status {done.returncode}", file=sys.stderr)
                return 1
            rows.append(json.loads(out.read_text(encoding="utf-8")))
    write_result(rows, args)
    return 0


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(prog="benchmarks/gpu_sglang.py", description=__doc__, formatter_class=raw)
    made.add_argument("--config", type=Path, help="config.json of a Qwen2.5-VL model, or its folder (default: 7B)")
    made.add_argument("--prompts", type=int, default=8, help="images; each has n siblings (default: 8)")
    made.add_argument("--n", type=int, default=16, help="siblings of each prompt (default: 16)")
    made.add_argument("--new-tokens", type=int, default=64, help="of each turn (default: 64)")
    made.add_argument("--attention-backend", help="of SGLang: triton, fa3, flashinfer (default: its own choice)")
    made.add_argument("--cuda-graph", action="store_true", help="capture decode graphs (longer start)")
    made.add_argument(
        "--mem-fraction", type=float, default=0.8, help="of the GPU, for weights and cache (default: 0.8)"
    )
    made.add_argument("--dry-run", "--quick", action="store_true", help="a tiny model, small images, n = 2")
    made.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_sglang.json")
    made.add_argument("--side", choices=("on", "off"), help=argparse.SUPPRESS)
    made.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    return made


def skipped(dry_run: bool) -> str:
    """What is not here, or nothing."""
    if find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not dry_run and not torch.cuda.is_available():
        return "no CUDA device seen by torch"
    if find_spec("sglang") is None:
        return "SGLang is not installed for this Python (docs/sglang.md)"
    return ""


def write_model(folder: Path, config: Path | None, tiny: bool) -> None:
    """config.json, a tokenizer of single bytes whose marks have small ids, and the processor's sizes. No weights."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    made = (
        SEVEN_B if config is None else json.loads((config / "config.json" if config.is_dir() else config).read_text())
    )
    if tiny:
        made = made | TINY | {"vision_config": made["vision_config"] | TINY_VISION, "torch_dtype": "float32"}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:250]
    tokenizer = Tokenizer(models.BPE({letter: k for k, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {name: tokenizer.token_to_id(name) for name in SPECIAL}
    made = made | {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"]}
    made |= {"vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"]}
    made |= {"eos_token_id": ids["<|im_end|>"], "bos_token_id": ids["<|im_start|>"]}
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    processor = {"min_pixels": 784, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2}
    processor |= {"temporal_patch_size": 2, "image_processor_type": "Qwen2VLImageProcessor"}
    processor |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    files = {"config": made, "tokenizer_config": words | {"chat_template": "{{ messages }}"}}
    files |= {"preprocessor_config": processor | {"processor_class": "Qwen2_5_VLProcessor"}}
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")


def engine_arguments(args: argparse.Namespace, on_gpu: bool) -> dict[str, Any]:
    """Of `sglang.Engine`."""
    made: dict[str, Any] = {"load_format": "dummy", "disable_radix_cache": args.side == "off"}
    if not on_gpu:
        return made | {"max_total_tokens": 8192}
    if attention := args.attention_backend:
        # never sdpa: it masks all patches of a batch against each other, 4 GB for four large images
        made |= {"attention_backend": attention, "mm_attention_backend": "fa3" if attention == "fa3" else "triton_attn"}
    made |= {"sampling_backend": "pytorch", "grammar_backend": "none", "chunked_prefill_size": 8192}
    return made | {"disable_cuda_graph": not args.cuda_graph, "mem_fraction_static": args.mem_fraction}


async def measure(args: argparse.Namespace) -> int:
    """One side, in this process; its row goes to --output."""
    import torch

    from vtengine.engine.sglang import SglangEngineBackend

    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", "bfloat16") if on_gpu else ("cpu", "float32")
    if not on_gpu:  # compiling for a CPU takes minutes, and the engine's processes inherit this
        os.environ |= {"TORCH_COMPILE_DISABLE": "1", "TORCHDYNAMO_DISABLE": "1"}
    os.environ.setdefault("SGLANG_VLM_CACHE_SIZE_MB", "2048")  # by itself 100, which siblings' large views overflow
    began_s = time.perf_counter()
    arguments = engine_arguments(args, on_gpu)
    backend = SglangEngineBackend(args.model, device=device, dtype=dtype, arguments=arguments, deadline_s=COMPILING_S)
    row: dict[str, Any] = {"resumption": args.side, "startup_s": time.perf_counter() - began_s}
    load = Load(backend, json.loads((args.model / "config.json").read_text(encoding="utf-8")), args, dtype)
    await load.two_turns(10_000, 1)  # kernels are compiled at their first use
    first, second, seconds = await load.two_turns(0, load.prompts)
    await backend.close()
    row |= {"prompts": load.prompts, "n": load.n, "new_tokens": load.new_tokens}
    row |= {"visual_tokens": [load.low * load.low, load.high * load.high]}
    for turn, done, wall_s in ((1, first, seconds[0]), (2, second, seconds[1])):
        prompt, cached = sum(one.prompt_tokens for one in done), sum(one.cached_tokens for one in done)
        row |= {f"turn{turn}_s": wall_s, f"turn{turn}_prompt_tokens": prompt, f"turn{turn}_cached_tokens": cached}
        row[f"turn{turn}_tokens_per_s"] = sum(len(one.token_ids) for one in done) / wall_s
        row[f"turn{turn}_ttft_ms"] = 1e3 * statistics.median(one.ttft_s for one in done)
    row["episodes_per_s"] = len(first) / sum(seconds)
    args.output.write_text(json.dumps(row), encoding="utf-8")
    return 0


class Load:
    """What is asked. low, high: visual tokens per side of the square views. dtype: of the pixel values."""

    def __init__(
        self, backend: Backend, config: dict[str, Any], args: argparse.Namespace, dtype: str = "float32"
    ) -> None:
        self.backend, self.config, self.dtype = backend, config, dtype
        sizes = (1, 2, 4, 4, 8) if args.dry_run else (args.prompts, args.n, args.new_tokens, 32, 64)
        self.prompts, self.n, self.new_tokens, self.low, self.high = sizes
        never = ("image_token_id", "video_token_id", "eos_token_id")
        self.bans = {config[name]: float("-inf") for name in never}

    async def two_turns(self, first: int, count: int) -> tuple[list[Completion], list[Completion], list[float]]:
        """Replies of both turns of `count` prompts from number `first` on, and the seconds of each turn."""
        views = [(self.image(first + p, self.low), self.image(first + p, self.high)) for p in range(count)]
        places = [(p, k) for p in range(count) for k in range(self.n)]
        asked = [self.shown(views[p][0], first + p) for p, _ in places]
        at = [time.perf_counter()]
        one = await asyncio.gather(
            *(self.ask(f"1-{first + p}-{k}", ids, views[p][:1], k) for (p, k), ids in zip(places, asked, strict=True))
        )
        at.append(time.perf_counter())
        later = [
            ids + done.token_ids + self.shown(views[p][1], -1 - first - p)
            for (p, _), ids, done in zip(places, asked, one, strict=True)
        ]
        two = await asyncio.gather(
            *(self.ask(f"2-{first + p}-{k}", ids, views[p], k) for (p, k), ids in zip(places, later, strict=True))
        )
        at.append(time.perf_counter())
        return one, two, [after - before for before, after in itertools.pairwise(at)]

    def image(self, prompt: int, side: int) -> ImageInput:
        import torch

        from vtengine.engine.base import ImageInput

        seed = torch.Generator().manual_seed(prompt * 100 + side)
        pixels = torch.randint(-128, 128, (4 * side * side, 1176), generator=seed).float() / 64
        return ImageInput(f"{prompt}-{side}", (1, 2 * side, 2 * side), pixels.to(getattr(torch, self.dtype)))

    def shown(self, picture: ImageInput, text: int) -> tuple[int, ...]:
        """Words, the picture's placeholders, words; other ones for each `text`."""
        draw = random.Random(text)
        words = [draw.randrange(200) for _ in range(TEXT_TOKENS // 2)]
        start, end = self.config["vision_start_token_id"], self.config["vision_end_token_id"]
        return (*words, start, *[self.config["image_token_id"]] * picture.visual_tokens, end, *words)

    async def ask(self, name: str, ids: tuple[int, ...], images: tuple[ImageInput, ...], seed: int) -> Completion:
        from vtengine.engine.base import Request, SamplingParams

        sampling = SamplingParams(self.new_tokens, temperature=1.0, seed=seed, logit_bias=self.bans)
        return await self.backend.generate(Request(name, ids, images, sampling))


def write_result(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    from run import write

    from vtengine.stamp import stamp

    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    if args.dry_run and args.output == parser().get_default("output"):
        return
    write({"suite": "gpu_sglang", "stamp": stamp(ROOT), "quick": args.dry_run, "rows": rows}, args.output)


if __name__ == "__main__":
    sys.exit(main())
