"""What all families' configurations have in common: sizes, and how wrong ones are refused. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

MAX_LAYERS = 1024
MAX_SIZE = 1 << 24  # of anything else: far beyond any model, and products of three still fit into 64 bits


class ModelLoadError(ValueError):
    """A checkpoint cannot be used as it is; the message says what is wrong with it and what to do."""


@dataclass(frozen=True)
class VisionSizes:
    """A vision tower. Sizes in pixels where not said otherwise. model_type: of the family that has such a tower."""

    model_type: ClassVar[str]

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    patch_size: int
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    in_channels: int = 3

    def __post_init__(self) -> None:
        check_sizes("vision_config", vars(self))
        widths = {
            "hidden_size * spatial_merge_size**2": self.hidden_size * self.merge_unit,
            "in_channels * temporal_patch_size * patch_size**2": self.patch_dim,
        }
        check_sizes("vision_config", widths)
        if self.hidden_size % (4 * self.num_heads):
            raise ModelLoadError(
                f"vision_config.hidden_size = {self.hidden_size}: must be a multiple of 4 * num_heads "
                f"(= {4 * self.num_heads})"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merge_unit(self) -> int:
        """Patches per visual token."""
        return self.spatial_merge_size**2

    @property
    def compact_dim(self) -> int:
        """Values per patch when the temporal copies are left out (588 for patches of 14 pixels, 768 for 16)."""
        return self.in_channels * self.patch_size**2

    @property
    def patch_dim(self) -> int:
        """Values per patch (1176 or 1536)."""
        return self.compact_dim * self.temporal_patch_size

    @property
    def feature_size(self) -> int:
        """Columns of a visual token's features."""
        return self.out_hidden_size


@dataclass(frozen=True)
class TextSizes:
    """A language model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    max_position_embeddings: int = 128_000

    def __post_init__(self) -> None:
        check_sizes("text_config", vars(self), exclude=("rms_norm_eps", "rope_theta", "mrope_section"))
        check_sizes("text_config", {"num_attention_heads * head_dim": self.q_size})
        self._check_head_size()
        for name, number in (("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope_theta)):
            if not 0 < number < math.inf:
                raise ModelLoadError(f"text_config.{name} = {number}: must be positive and finite")
        if self.num_heads % self.num_kv_heads:
            raise ModelLoadError(
                f"num_key_value_heads = {self.num_kv_heads}: must divide num_attention_heads (= {self.num_heads})"
            )
        shares = self.mrope_section
        whole = all(type(share) is int and share >= 0 for share in shares)
        if len(shares) != 3 or not whole or sum(shares) != self.head_dim // 2:
            raise ModelLoadError(
                f"rope_scaling.mrope_section = {list(shares)}: must be three whole numbers that add up to "
                f"half the head size (= {self.head_dim // 2})"
            )

    def _check_head_size(self) -> None:
        if self.head_dim % 2:
            raise ModelLoadError(f"text_config.head_dim = {self.head_dim}: must be even")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def q_size(self) -> int:
        """Rows of a layer's queries."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of a layer's keys, and of its values."""
        return self.num_kv_heads * self.head_dim


def check_sizes(where: str, values: Mapping[str, Any], exclude: tuple[str, ...] = ()) -> None:
    """Raises ModelLoadError for what is no whole number within reason; lists are for others to see to."""
    for name, value in values.items():
        if name in exclude or isinstance(value, tuple):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelLoadError(f"{where}.{name} = {value!r}: must be a whole number of at least 1")
        most = MAX_LAYERS if name in ("depth", "num_layers") else MAX_SIZE
        if value > most:
            raise ModelLoadError(f"{where}.{name} = {value}: must be at most {most}")


def check_blocks(name: str, blocks: tuple[int, ...], depth: int) -> None:
    """Raises ModelLoadError for numbers of vision blocks that are not there."""
    if outside := [i for i in blocks if type(i) is not int or not 0 <= i < depth]:
        raise ModelLoadError(f"vision_config.{name}: {outside} not in 0..{depth - 1} (depth)")


def refuse_unsupported(settings: Iterable[tuple[str, Any, tuple[Any, ...]]]) -> None:
    """(name, value, allowed): settings that change what the weights mean. Raises ModelLoadError for other values."""
    for name, value, allowed in settings:
        if value not in allowed:
            shown = ", ".join(repr(a) for a in allowed)
            raise ModelLoadError(f"{name} = {value!r}: not supported (allowed: {shown}); use an unmodified checkpoint")


TEXT_KEYS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}
"""Fields of a language model that a `config.json` calls otherwise."""

T = TypeVar("T", bound=VisionSizes | TextSizes)


def read_sizes(left_out: T, values: Mapping[str, Any], keys: Mapping[str, str] | None = None) -> T:
    """`left_out` with what a file states in the place of its own. keys: field -> key, where they differ."""
    stated: dict[str, Any] = {}
    for field in fields(left_out):
        key, default = (keys or {}).get(field.name, field.name), getattr(left_out, field.name)
        if key in values:
            value = values[key]
            stated[field.name] = type(default)(value) if isinstance(default, (float, tuple)) else value
    return replace(left_out, **stated)


def read_text(left_out: T, text: Mapping[str, Any]) -> T:
    """The language model of a file. Where the number of key heads is null, every query head has its own."""
    values = dict(text) | dict(rope_of(text))
    if not values.get("num_key_value_heads", True):
        values["num_key_value_heads"] = values.get("num_attention_heads", left_out.num_heads)
    return read_sizes(left_out, values, TEXT_KEYS)


def write_sizes(sizes: VisionSizes | TextSizes, keys: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The way back of `read_sizes`."""
    named = {(keys or {}).get(name, name): value for name, value in vars(sizes).items()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in named.items()}


def write_text(text: TextSizes, rope: Mapping[str, Any]) -> dict[str, Any]:
    """What every family's file says of a language model. rope: how this one calls its kind of positions."""
    sizes = write_sizes(text, TEXT_KEYS)
    return {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "use_cache": True,
        "rope_scaling": {**rope, "mrope_section": sizes.pop("mrope_section")},
        **sizes,
    }


def rope_of(text: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the rotary embedding, as transformers 4 or 5 calls them."""
    return text.get("rope_scaling") or text.get("rope_parameters") or {}
