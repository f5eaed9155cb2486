"""Models of the sizes of Qwen2.5-VL with random weights, for what does not depend on what they say."""

from __future__ import annotations

import torch

from vtengine.engine.base import ImageInput
from vtengine.model import ModelConfig, Qwen2_5_VL, TextConfig, VisionConfig

PAD = 151655
SMALL = {"hidden_size": 256, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 256}
SHAPES = {
    "7B": {"hidden_size": 3584, "num_layers": 28, "num_heads": 28, "num_kv_heads": 4, "intermediate_size": 18944},
    "3B": {"hidden_size": 2048, "num_layers": 36, "num_heads": 16, "num_kv_heads": 2, "intermediate_size": 11008},
}


def shape(name: str, quick: bool) -> tuple[str, dict[str, int]]:
    """(name, sizes) of one of SHAPES; quick: one that a CPU can run. RuntimeError: no GPU for what needs one."""
    if not torch.cuda.is_available() and not quick:
        raise RuntimeError("this suite needs a CUDA device; --quick shows on the CPU that it runs")
    return ("small", SMALL) if quick else (name, SHAPES[name])


def config_of(sizes: dict[str, int]) -> ModelConfig:
    """Of a model with the real vision tower, or a small one with SMALL."""
    vision = {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "fullatt_block_indexes": (1,)}
    vision = {"out_hidden_size": sizes["hidden_size"]} | (vision if sizes is SMALL else {})
    return ModelConfig(
        text=TextConfig(vocab_size=151936, **sizes), vision=VisionConfig(**vision), image_token_id=PAD,
        video_token_id=PAD + 1, vision_start_token_id=PAD - 3, vision_end_token_id=PAD - 2, eos_token_id=PAD - 10,
        bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip


def model_of(sizes: dict[str, int], learns: bool = False) -> Qwen2_5_VL:
    """On the GPU in bfloat16, or on the CPU where there is none. learns: its weights may get gradients."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    with torch.device("meta"):
        model = Qwen2_5_VL(config_of(sizes))
    model = model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
            else:
                parameter.fill_(1.0)
    return model.requires_grad_(learns).train(learns)


def view_of(picture: int, side: int, dtype: torch.dtype) -> ImageInput:
    """A square view of side x side patches of noise; the same numbers give the same one."""
    generator = torch.Generator().manual_seed(1000 * picture + side)
    pixels = torch.randn(side * side, 588, generator=generator).to(dtype)
    return ImageInput(f"picture-{picture}-{side}", (1, side, side), pixels)


class NoText:
    """The engine asks for text only where there are stop strings."""

    def decode(self, token_ids: object) -> str:
        return ""
