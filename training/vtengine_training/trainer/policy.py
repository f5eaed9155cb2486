"""Log-probabilities of sampled tokens under a model, with gradients: the training side of what the engine sampled."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from vtengine_kernels.grpo_loss import Head, Loss, Objective, Tokens, grpo_loss
from vtengine_kernels.token_logprob import BANNED, token_logprob
from vtengine_kernels.visual_scatter import visual_scatter

from vtengine.model import PackedTree, VLModel, plain_attention
from vtengine_training.lora.layers import AdaptedLinear
from vtengine_training.trainer.batch import MicroBatch


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments): how one enters a model that is whole."""
    return function(*arguments)


@dataclass(frozen=True, eq=False)
class Policy:
    """A model as a distribution over replies: the engine's temperature and bans applied, as when it sampled.

    banned: ids that can never be sampled. chunk: positions whose logits exist at the same time. train_vision: whether
    gradients reach the vision tower. fused: logits by the kernels token_logprob and grpo_loss; otherwise by torch, with
    gradients by autograd, more positions than a chunk computed again in the backward pass. enter: calls a function that
    uses the model; a sharded model is gathered in there.
    """

    model: VLModel
    temperature: float
    banned: tuple[int, ...]
    chunk: int
    train_vision: bool = True
    fused: bool = True
    enter: Callable[..., Any] = call

    @staticmethod
    def build(
        model: VLModel,
        temperature: float,
        banned: Collection[int],
        chunk: int,
        train_vision: bool = True,
        fused: bool = True,
        enter: Callable[..., Any] = call,
    ) -> Policy:
        """Adds the ids that the engine itself never samples."""
        config = model.config
        ids = {*banned, config.image_token_id, config.video_token_id}
        kept = tuple(sorted(i for i in ids if i < config.text.vocab_size))
        return Policy(model, temperature, kept, chunk, train_vision, fused, enter)

    def logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(log-probabilities, entropies), float32 [N], of the batch's trainable tokens. Natural logarithms."""
        found: tuple[Tensor, Tensor] = self.enter(self._logprobs, batch)
        return found

    def _logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        with attention_kernel(self.model.device):
            hidden = self._hidden(batch)
        if self.fused:
            return token_logprob(hidden, self._head(), batch.targets, chunk=self.chunk)
        return self._read(hidden, batch.targets)

    def loss(self, batch: MicroBatch, tokens: Tokens, objective: Objective) -> Loss:
        """The loss of the batch's trainable tokens, its gradients formed on the way."""
        found: tuple[Tensor, Loss] = self.enter(self._loss, batch, tokens, objective)
        return found[1]

    def _loss(self, batch: MicroBatch, tokens: Tokens, objective: Objective) -> tuple[Tensor, Loss]:
        """(its total, the loss): a sharded model watches for the gradient of the tensors that it returns."""
        with attention_kernel(self.model.device):
            hidden = self._hidden(batch)
        loss = grpo_loss(hidden, self._head(), batch.targets, tokens, objective, chunk=self.chunk)
        return loss.total, loss

    def _head(self) -> Head:
        head = self.model.lm_head
        low_rank = head.low_rank() if isinstance(head, AdaptedLinear) else None
        return Head(self.model.head_weight, self.temperature, banned=self._banned_ids, low_rank=low_rank)

    @cached_property
    def _banned_ids(self) -> Tensor | None:
        """int64 [B], on the model's device."""
        return torch.tensor(self.banned, device=self.model.device) if self.banned else None

    def _hidden(self, batch: MicroBatch) -> Tensor:
        """[N, H]: the final hidden states that predict the trainable tokens."""
        features = None
        if batch.pixel_values is not None:
            with nullcontext() if self.train_vision else torch.no_grad():
                features = self.model.visual(batch.pixel_values.to(self.model.dtype), batch.grids)
            if batch.placement is not None:
                features = visual_scatter(features, batch.placement)
        embeds = self.model.embed(batch.token_ids, features)
        return self.model.decode(embeds, batch.positions, PackedTree(batch.tree), batch.sources)

    def _read(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits chunk by chunk, never all at once."""
        if len(targets) <= self.chunk:
            return self._chunk(hidden, targets)
        pieces = []
        for part, wanted in zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True):
            if torch.is_grad_enabled():
                pieces.append(checkpoint(self._chunk, part, wanted, use_reentrant=False))
            else:
                pieces.append(self._chunk(part, wanted))
        logprobs, entropies = zip(*pieces, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def _chunk(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model.logits(hidden).float()
        if self.temperature != 1:
            logits = logits / self.temperature
        if self._banned_ids is not None:
            logits = logits.index_fill(1, self._banned_ids, BANNED)
        total = logits.logsumexp(dim=1)
        logprobs = logits.gather(1, targets[:, None])[:, 0] - total
        entropies = total - ((logits - total[:, None]).exp() * logits).sum(dim=1)
        return logprobs, entropies


def attention_kernel(device: torch.device) -> AbstractContextManager[object]:
    """On CPUs the plain kernel: the flash kernel's backward is slow there."""
    return plain_attention() if device.type == "cpu" else nullcontext()
