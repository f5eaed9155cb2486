"""Qwen2.5-VL: vision tower and language model, packed (no batch dimension), the same module for inference and training.

The language model knows nothing of caches: it hands q, k and v of its tokens to an `AttentionContext`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vtengine_kernels.layer_ops import rotary

from vtengine.model.attention import AttentionContext
from vtengine.model.config import ModelConfig, TextConfig
from vtengine.model.layers import RMSNorm, SwiGLU, inverse_frequencies, rotary_tables
from vtengine.model.linear import Linear, linear
from vtengine.model.vision_tower import VisionTower


class TextAttention(nn.Module):
    """Grouped-query attention; q, k and v are one matrix (rows of q, then k, then v)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = Linear(config.hidden_size, rows)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attention: AttentionContext, rows: Tensor | None
    ) -> Tensor:
        """x [T, H] -> [T, H], or only the wanted `rows` [R] of it."""
        qkv = self.qkv(x).view(-1, self.heads + 2 * self.kv_heads, self.head_dim)
        turned = self.heads + self.kv_heads
        rotated = rotary(qkv[:, :turned], cos, sin)
        out = attention.attend(layer, rotated[:, : self.heads], rotated[:, self.heads :], qkv[:, turned:])
        return self.o_proj(_pick(out, rows).flatten(1))


class TextLayer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = TextAttention(config)
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attention: AttentionContext, rows: Tensor | None
    ) -> Tensor:
        x = _pick(x, rows) + self.attn(self.input_norm(x), cos, sin, layer, attention, rows)
        return x + self.mlp(self.post_norm(x))


class Qwen2_5_VL(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        text = config.text
        self.visual = VisionTower(config.vision)
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(TextLayer(text) for _ in range(text.num_layers))
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(text.hidden_size, text.vocab_size, bias=False)

    @staticmethod
    def build(config: ModelConfig, seed: int) -> Qwen2_5_VL:
        """Random weights to train from: matrices normal with standard deviation 1 / sqrt(fan-in), biases 0, norms 1.

        The usual 0.02 leaves a small model at chance when it is trained from nothing.
        """
        with torch.device("meta"):
            model = Qwen2_5_VL(config)
        model.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return model

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def embed(self, token_ids: Tensor, visual_features: Tensor | None = None) -> Tensor:
        """token_ids int64 [T] -> [T, H]; rows of image_token_id become the rows of visual_features [V, H], in order.

        Raises ValueError unless there are exactly V such ids. With None the ids are looked up as they are.
        """
        embeds = F.embedding(token_ids, self.embed_tokens.weight)
        if visual_features is None:
            return embeds
        places = (token_ids == self.config.image_token_id).nonzero().view(-1)
        if len(places) != len(visual_features):
            raise ValueError(
                f"token_ids hold {len(places)} ids {self.config.image_token_id} (image), visual_features "
                f"{len(visual_features)} rows: must be equal"
            )
        return embeds.index_copy(0, places, visual_features.to(embeds.dtype))

    def decode(
        self, embeds: Tensor, positions: Tensor, attention: AttentionContext, rows: Tensor | None = None
    ) -> Tensor:
        """embeds [T, H], positions int64 [3, T] (see `mrope_positions`) -> hidden [T, H], final norm applied.

        rows: int64 [R], the only tokens whose hidden state is wanted -> [R, H]; the last layer then computes no others.
        """
        cos, sin = rotary_tables(self._angles(positions))
        x = embeds
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, index, attention, rows if index == len(self.layers) - 1 else None)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [T, vocab], in the model's dtype."""
        out: Tensor = linear(hidden, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(hidden)
        return out

    @property
    def head_weight(self) -> Tensor:
        """[vocab, H]: of the head, or of the embedding where the two are tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def _angles(self, positions: Tensor) -> Tensor:
        """float32 [T, D/2]: each frequency turns with the temporal, height or width position, by section."""
        text = self.config.text
        axis, frequencies = _mrope(text.mrope_section, text.head_dim, text.rope_theta, positions.device)
        return positions.index_select(0, axis).t() * frequencies


def _pick(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _mrope(section: tuple[int, int, int], head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """(axis int64 [D/2]: 0, 1 or 2 per frequency; frequencies float32 [D/2])."""
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(section)).to(device)
    return axis, inverse_frequencies(head_dim, theta, device)
