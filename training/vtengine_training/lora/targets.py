"""Which layers get adapters: names of a checkpoint's linear layers, matched against those of the configuration."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from vtengine.model import ModelConfig, checkpoint_name, meta_model
from vtengine.model.linear import Linear
from vtengine.model.names import hf_modules
from vtengine_training.lora.config import LoraConfig

HEAD = "lm_head"
MERGERS = ("visual.merger.", "visual.deepstack_merger_list.")
VISION = "visual."
FROZEN = {"vision": "vision tower", "merger": "merger"}


@dataclass(frozen=True)
class Target:
    """A linear layer of the checkpoint: its name there, our module that holds it, and which of that one's rows."""

    name: str
    path: str
    begin: int
    end: int
    inputs: int

    def parameters(self, rank: int) -> int:
        """Of its adapter."""
        return rank * (self.inputs + self.end - self.begin)


def find_targets(config: ModelConfig, lora: LoraConfig) -> list[Target]:
    """The layers that get adapters, in the model's order.

    Raises ValueError for a name that no layer has (with those nearest to it), that is in a part which stays frozen, or
    that is the head of a model whose head is the embedding.
    """
    layers = linear_layers(config)
    if not lora.targets:
        return [layer for layer in layers if layer.name != HEAD and _frozen_by(layer.name, lora) is None]
    chosen: set[str] = set()
    for target in lora.targets:
        found = [layer.name for layer in layers if _is_called(layer.name, target)]
        if not found:
            raise ValueError(_unknown(target, layers, config))
        trained = [name for name in found if _frozen_by(name, lora) is None]
        if not trained:
            field = _frozen_by(found[0], lora) or ""
            raise ValueError(
                f"lora.targets: {target!r} is in the {FROZEN[field]}, which stays frozen; set lora.{field} = true"
            )
        chosen.update(trained)
    if HEAD in chosen and lora.dropout:
        raise ValueError(
            f"lora.dropout = {lora.dropout}: the loss takes the head's adapter whole; use 0, or leave lm_head out"
        )
    return [layer for layer in layers if layer.name in chosen]


def linear_layers(config: ModelConfig) -> list[Target]:
    """All of them, as a checkpoint has them (q, k and v each on its own), in the model's order."""
    model = meta_model(config)
    found = []
    for path, parts in hf_modules(model).items():
        module = model.get_submodule(path)
        if not isinstance(module, Linear):
            continue
        begin = 0
        for name, rows in parts.items():
            end = begin + (rows or module.out_features)
            found.append(Target(name, path, begin, end, module.in_features))
            begin = end
    return found


def _is_called(name: str, target: str) -> bool:
    wanted = checkpoint_name(target)
    return name == wanted or name.endswith(f".{target}")


def _frozen_by(name: str, lora: LoraConfig) -> Literal["vision", "merger"] | None:
    """The field of the configuration that would have to be true, or None."""
    if name.startswith(MERGERS):
        return None if lora.merger else "merger"
    if name.startswith(VISION):
        return None if lora.vision else "vision"
    return None


def _unknown(target: str, layers: list[Target], config: ModelConfig) -> str:
    if target == HEAD and config.tie_word_embeddings:
        return (
            f"lora.targets: {HEAD!r}: this model's head is its embedding (tie_word_embeddings), and an adapter of "
            "the head alone would tear the two apart; leave it out"
        )
    known = list(dict.fromkeys(layer.name.rpartition(".")[2] for layer in layers))
    whole = [layer.name for layer in layers]
    near = difflib.get_close_matches(target, [*known, *whole], 3, 0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(known)}"
    return f"lora.targets: no linear layer is called {target!r}; {hint}"
