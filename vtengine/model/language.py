"""What all families have in common: a vision tower and a language model, packed (no batch dimension).

The same module serves inference and training. The language model knows nothing of caches: it hands q, k and v of its
tokens to an `AttentionContext`. How a family differs is said in its own file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vtengine_kernels.layer_ops import rotary

from vtengine.model.attention import AttentionContext
from vtengine.model.config import ModelConfig
from vtengine.model.layers import RMSNorm, SwiGLU, inverse_frequencies, rotary_tables
from vtengine.model.linear import Linear, linear, linear_float32
from vtengine.model.sizes import TextSizes
from vtengine.model.tower import Tower


class TextAttention(nn.Module):
    """Grouped-query attention; q, k and v are one matrix (rows of q, then k, then v)."""

    def __init__(self, config: TextSizes, bias: bool = True) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv = Linear(config.hidden_size, config.q_size + 2 * config.kv_size, bias=bias)
        self.o_proj = Linear(config.q_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attention: AttentionContext, rows: Tensor | None
    ) -> Tensor:
        """x [T, H] -> [T, H], or only the wanted `rows` [R] of it."""
        qkv = self.qkv(x).view(-1, self.heads + 2 * self.kv_heads, self.head_dim)
        turned = self.heads + self.kv_heads
        rotated = rotary(self.normed(qkv[:, :turned]), cos, sin)
        out = attention.attend(layer, rotated[:, : self.heads], rotated[:, self.heads :], qkv[:, turned:])
        return self.o_proj(_pick(out, rows).flatten(1))

    def normed(self, qk: Tensor) -> Tensor:
        """qk [T, heads of q, then of k, D], what is then turned by its position."""
        return qk


class TextLayer(nn.Module):
    def __init__(self, config: TextSizes, attn: TextAttention) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = attn
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attention: AttentionContext, rows: Tensor | None
    ) -> Tensor:
        attended = self.attn(self.input_norm(x), cos, sin, layer, attention, rows)
        x, normed = self.post_norm.added(_pick(x, rows), attended)
        return x + self.mlp(normed)


class VLModel(nn.Module):
    """A model of any family; `meta_model` makes the right one for a config."""

    nested_names: ClassVar[bool]
    """Whether its released checkpoints say `model.visual.*` and `model.language_model.*`."""
    head_norms: ClassVar[tuple[str, ...]] = ()
    """Modules of its attention that norm the heads of q or k."""

    def __init__(self, config: ModelConfig, visual: Tower, attention: Callable[[], TextAttention]) -> None:
        super().__init__()
        self.config = config
        text = config.text
        self.visual = visual
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(TextLayer(text, attention()) for _ in range(text.num_layers))
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(text.hidden_size, text.vocab_size, bias=False)

    @staticmethod
    def rotary_axes(section: tuple[int, int, int]) -> Tensor:
        """int64 [D/2]: which position turns a frequency: 0 temporal, 1 height, 2 width."""
        raise NotImplementedError

    @classmethod
    def build(cls, config: ModelConfig, seed: int) -> Self:
        """Random weights to train from: matrices normal with standard deviation 1 / sqrt(fan-in), biases 0, norms 1.

        The usual 0.02 leaves a small model at chance when it is trained from nothing.
        """
        with torch.device("meta"):
            model = cls(config)  # type: ignore[call-arg]
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

    def embed(self, token_ids: Tensor, visual_features: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """token_ids int64 [T] -> [T, H]; rows of image_token_id become the rows of visual_features [V, H], in order.

        places: int64 [V], where these ids are; None: they are looked for, and on CUDA the host waits for the answer.
        Features of more than H columns come from towers that speak to several layers (see `decode`): then [T, as many],
        0 for text. Raises ValueError unless there are exactly V such ids. With None the ids are looked up as they are.
        """
        embeds = F.embedding(token_ids, self.embed_tokens.weight)
        if visual_features is None:
            return embeds
        if places is None:
            places = (token_ids == self.config.image_token_id).nonzero().view(-1)
        if len(places) != len(visual_features):
            raise ValueError(
                f"token_ids hold {len(places)} ids {self.config.image_token_id} (image), visual_features "
                f"{len(visual_features)} rows: must be equal"
            )
        if (more := visual_features.shape[1] - embeds.shape[1]) > 0:
            embeds = F.pad(embeds, (0, more))
        return embeds.index_copy(0, places, visual_features.to(embeds.dtype))

    def decode(
        self, embeds: Tensor, positions: Tensor, attention: AttentionContext, rows: Tensor | None = None
    ) -> Tensor:
        """embeds [T, H], positions int64 [3, T] (see `mrope_positions`) -> hidden [T, H], final norm applied.

        embeds [T, (1 + n) H]: the columns after the first H are added to what the first n layers give.
        rows: int64 [R], the only tokens whose hidden state is wanted -> [R, H]; the last layer then computes no others.
        """
        cos, sin = rotary_tables(self._angles(positions))
        x, *added = embeds.split(self.config.text.hidden_size, 1)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, index, attention, rows if index == len(self.layers) - 1 else None)
            if index < len(added):
                x = x + added[index]
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [T, vocab], in the model's dtype."""
        out: Tensor = linear(hidden, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(hidden)
        return out

    def scores(self, hidden: Tensor) -> Tensor:
        """[T, H] -> float32 [T, vocab]: logits for sampling, without gradients, as exact as the device has them."""
        if self.lm_head is None or type(self.lm_head) is Linear:
            return linear_float32(hidden, self.head_weight)
        return self.lm_head(hidden).float()  # an adapter's

    @property
    def head_weight(self) -> Tensor:
        """[vocab, H]: of the head, or of the embedding where the two are tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def _angles(self, positions: Tensor) -> Tensor:
        """float32 [T, D/2]: each frequency turns with the temporal, height or width position."""
        text = self.config.text
        axes = _on_device(self.rotary_axes, text.mrope_section, positions.device)
        return positions.index_select(0, axes).t() * inverse_frequencies(
            text.head_dim, text.rope_theta, positions.device
        )


def _pick(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


@functools.cache  # without end: CUDA graphs hold the addresses
@torch.inference_mode(False)
def _on_device(
    axes: Callable[[tuple[int, int, int]], Tensor], section: tuple[int, int, int], device: torch.device
) -> Tensor:
    return axes(section).to(device)
