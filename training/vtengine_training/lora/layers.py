"""A linear layer with adapters on some of its rows: the frozen product, then what peft's layers add to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vtengine_kernels.token_logprob import LowRank

from vtengine.model.linear import Linear, linear

ADAPTER = "default"
"""peft's own name for the only adapter there is."""


class Switch:
    """Whether the adapters of a model count; without them it is the model that training began with."""

    def __init__(self) -> None:
        self.is_on = True

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model as it was, while inside."""
        before, self.is_on = self.is_on, False
        try:
            yield
        finally:
            self.is_on = before


class Rows(nn.Linear):
    """Some rows of a larger layer under their name in a checkpoint, for peft to put an adapter on. No parameters."""

    def __init__(self, whole: Linear, begin: int, end: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = whole.in_features, end - begin
        self.begin, self.end = begin, end
        self._whole = (whole,)  # in a tuple: it is no child

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self._whole[0].weight[self.begin : self.end]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        bias = self._whole[0].bias
        return None if bias is None else bias[self.begin : self.end]

    def forward(self, input: Tensor, product: Tensor) -> Tensor:  # type: ignore[override]
        """The rows' share of the whole layer's product, which is there already."""
        return product


class AdaptedLinear(Linear):
    """Takes the place of a Linear and keeps its parameters, frozen, under the same names.

    spans: (name, first row, row behind the last) of the parts that get an adapter, in order; each becomes a child of
    that name. Where gradients are formed, peft's own layers run; elsewhere (generating) the same sum is made in place.
    """

    def __init__(self, base: Linear, spans: Sequence[tuple[str, int, int]], switch: Switch) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.spans, self.switch = list(spans), switch
        for name, begin, end in spans:
            self.add_module(name, Rows(self, begin, end))

    def forward(self, input: Tensor) -> Tensor:
        product = super().forward(input)
        if not self.switch.is_on:
            return product
        if torch.is_grad_enabled():
            return self._learning(input, product)
        for name, begin, end in self.spans:
            part = self._factors(name)
            product[:, begin:end].addmm_(linear(input, part.a), part.b.t(), alpha=part.scale)
        return product

    def _learning(self, input: Tensor, product: Tensor) -> Tensor:
        pieces, done = [], 0
        for name, begin, end in self.spans:
            pieces += [product[:, done:begin]] if begin > done else []
            pieces.append(self.get_submodule(name)(input, product[:, begin:end]))
            done = end
        pieces += [product[:, done:]] if done < self.out_features else []
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    def _factors(self, name: str) -> LowRank:
        layer: Any = self.get_submodule(name)
        return LowRank(layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER])

    def low_rank(self) -> LowRank | None:
        """What the adapter of a layer with one part adds to its weight; None while it is off."""
        ((name, _, _),) = self.spans
        return self._factors(name) if self.switch.is_on else None


class LearningDropout(nn.Dropout):
    """Active where gradients are formed; what is generated, and log-probabilities to compare with, know none."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, training=torch.is_grad_enabled())
