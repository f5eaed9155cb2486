"""The two losses: dense labels under every patch, and the next token of the assistant's replies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vtengine_kernels.visual_scatter import Placement, visual_scatter

from vtengine.model import PackedCausal, VLModel
from vtengine_training.glance.supervision import IGNORE, SIZES
from vtengine_training.sft.batch import Batch

LOOK_LAYER = 2
EMPTY_WEIGHT = 0.1
"""What a patch with nothing on it counts in the dense loss: most patches are empty."""

_MEAN = np.repeat(np.array([0.48145466, 0.4578275, 0.40821073], np.float32), 196)
_STD = np.repeat(np.array([0.26862954, 0.26130258, 0.27577711], np.float32), 196)


def normalise(pixels: np.ndarray) -> Tensor:
    """uint8 [P, 588] -> float32 [P, 588], as the processor does: rescale, then mean and deviation per channel."""
    scale, shift = torch.from_numpy(1 / (255 * _STD)), torch.from_numpy(_MEAN / _STD)
    return torch.from_numpy(pixels).float().mul_(scale).sub_(shift)


class Looking:
    """Causal attention that also scores where some places look: one head of one layer is taught to look at the answer.

    A small model finds out by itself where to look, but only after very many steps; the generator knows.
    """

    def __init__(self, batch: Batch) -> None:
        self.causal, self.batch = PackedCausal(batch.offsets.tolist()), batch
        self.loss: Tensor | None = None
        self.share = 0.0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention of `PackedCausal`; at LOOK_LAYER the loss is taken on the way."""
        if layer == LOOK_LAYER and len(self.batch.look_from):
            self._score(q[:, 0], k[:, 0])
        return self.causal.attend(layer, q, k, v)

    def _score(self, q: Tensor, k: Tensor) -> None:
        """q, k [T, D] of one head: minus the log of the attention that falls on the right tokens, averaged."""
        places = torch.from_numpy(self.batch.look_from)
        owner = np.searchsorted(self.batch.offsets, self.batch.look_from, side="right") - 1
        first = torch.from_numpy(self.batch.offsets[owner])
        keys = torch.arange(len(k))
        allowed = (keys >= first[:, None]) & (keys <= places[:, None])
        scores = (q.index_select(0, places) @ k.t()).float() * q.shape[1] ** -0.5
        scores = scores.masked_fill(~allowed, float("-inf"))
        right = torch.zeros_like(allowed)
        right[torch.from_numpy(self.batch.look_query), torch.from_numpy(self.batch.look_token)] = True
        log_share = scores.masked_fill(~right, float("-inf")).logsumexp(1) - scores.logsumexp(1)
        self.loss = -log_share.mean()
        self.share = float(log_share.detach().exp().mean())


class DenseHead(nn.Module):
    """From each merged visual token [V, H] to the labels of its four patches; thrown away after training."""

    def __init__(self, hidden: int, seed: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, 4 * sum(SIZES.values()))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.linear.weight.normal_(0, hidden**-0.5, generator=generator)
            self.linear.bias.zero_()

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """One [4 V, classes] per label, patches in merge-window order."""
        scores = self.linear(features).view(4 * len(features), -1)
        return scores.split(list(SIZES.values()), 1)


@dataclass(frozen=True)
class Losses:
    """Scalars; `figures` are shares and means for the log, already plain numbers."""

    total: Tensor
    figures: dict[str, float]


def dense_loss(head: DenseHead, features: Tensor, labels: np.ndarray) -> tuple[Tensor, dict[str, float]]:
    """Mean cross-entropy over the four labels; the log gets the accuracy on patches that hold something."""
    loss = features.new_zeros((), dtype=torch.float32)
    figures = {}
    targets = torch.from_numpy(labels).long()
    for column, (name, scores) in enumerate(zip(SIZES, head(features), strict=True)):
        target = targets[:, column]
        weight = torch.where(target == 0, EMPTY_WEIGHT, 1.0) * (target != IGNORE)
        each = F.cross_entropy(scores.float(), target, ignore_index=IGNORE, reduction="none")
        loss = loss + (each * weight).sum() / weight.sum().clamp_min(1)
        held = target > 0
        with torch.no_grad():
            figures[name] = float((scores.argmax(1) == target)[held].float().mean()) if held.any() else 1.0
    return loss, figures


def language_loss(
    model: VLModel, features: Tensor, batch: Batch, look_weight: float
) -> tuple[Tensor, dict[str, float]]:
    """Weighted mean cross-entropy of the assistant's tokens, plus `look_weight` times the looking loss."""
    ids, weights = torch.from_numpy(batch.ids), torch.from_numpy(batch.weights)
    shown = visual_scatter(features, Placement.of(batch.visual_rows, len(features)))
    embeds = model.embed(ids, shown)
    looking = Looking(batch)
    hidden = model.decode(embeds, torch.from_numpy(batch.positions), looking)
    taught = weights.nonzero().view(-1)
    scores = model.logits(hidden.index_select(0, taught - 1)).float()
    target, weight = ids[taught], weights[taught]
    each = F.cross_entropy(scores, target, reduction="none")
    with torch.no_grad():
        right = float((scores.argmax(1) == target).float().mean())
    loss = (each * weight).sum() / weight.sum()
    figures = {"token": right, "look": looking.share, "language_loss": float(loss.detach())}
    return loss if looking.loss is None else loss + look_weight * looking.loss, figures


def vision(model: VLModel, batch: Batch) -> Tensor:
    """Features [V, H] of the batch's views, in the model's dtype."""
    return model.visual(normalise(batch.pixels).to(model.dtype), batch.grids)


def losses(model: VLModel, head: DenseHead, batch: Batch, aux_weight: float, look_weight: float = 0.0) -> Losses:
    """Dense loss, plus the language and looking losses where the batch has text."""
    features = vision(model, batch)
    dense, figures = dense_loss(head, features, batch.labels)
    figures["dense_loss"] = float(dense.detach())
    if not len(batch.ids):
        return Losses(dense, figures)
    language, more = language_loss(model, features, batch, look_weight)
    figures |= more
    return Losses(language + aux_weight * dense, figures)
