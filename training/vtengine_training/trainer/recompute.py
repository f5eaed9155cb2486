"""Activation checkpointing: a layer keeps its input only, and runs again when its gradients are wanted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vtengine.model import VLModel
from vtengine_training.trainer.policy import attention_kernel


def recompute_layers(model: VLModel, draws: bool = False) -> None:
    """Every decoder layer and vision block of `model`, wherever gradients are on; generating is as before.

    draws: layers draw random numbers (dropout), and need the same ones again.
    """
    for layer in (*model.layers, *model.visual.blocks):
        layer.forward = partial(_forward, layer.forward, draws)


def _forward(forward: Callable[..., Tensor], draws: bool, x: Tensor, *rest: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(x, *rest)
    contexts = partial(_contexts, x.device)
    return checkpoint(forward, x, *rest, use_reentrant=False, preserve_rng_state=draws, context_fn=contexts)


def _contexts(device: torch.device) -> tuple[Any, Any]:
    """(around the first run, around the second): the second one comes outside of the pass that chose the kernel."""
    return nullcontext(), attention_kernel(device)
