"""AdamW on float32 master weights behind a model that computes in its own, usually smaller, dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vtengine_training.files import save_whole
from vtengine_training.sft.config import OptimizerConfig, PhaseConfig


def learning_rate(phase: PhaseConfig, step: int) -> float:
    """Rate at step `step` (from 0) of a phase: linear warm-up, then a cosine down to `final_rate`."""
    if step < phase.warmup:
        return phase.learning_rate * (step + 1) / phase.warmup
    done = (step - phase.warmup) / max(1, phase.steps - phase.warmup)
    return phase.final_rate + (phase.learning_rate - phase.final_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class MasterAdamW:
    """Keeps a float32 copy of every parameter; `step` updates the copies and writes them back into the modules.

    Gradients add up in float32, over any number of backward passes: as soon as a parameter's is complete it is added to
    its copy's, and freed. own_masters=False: the parameters are float32 themselves, gather their own gradients and are
    updated where they are (sharded ones: DTensors).
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig, own_masters: bool = True
    ) -> None:
        self.config = config
        self.live = dict(named)
        self.master: dict[str, Tensor] = dict(self.live)
        if own_masters:
            self.master = {name: p.detach().to(torch.float32, copy=True) for name, p in self.live.items()}
            for name, parameter in self.live.items():
                parameter.register_post_accumulate_grad_hook(partial(_hand_over, self.master[name]))
        matrices = [p for p in self.master.values() if p.ndim > 1]
        vectors = [p for p in self.master.values() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), fused=True)

    def step(self, rate: float) -> float:
        """One update with the gradients gathered since the last one, then drops them. Returns the gradient norm."""
        norm: Any = nn.utils.clip_grad_norm_(self.master.values(), self.config.clip)
        if hasattr(norm, "full_tensor"):  # of sharded gradients: that of all ranks
            norm = norm.full_tensor()
        for group in self.adam.param_groups:
            group["lr"] = rate
        if bool(torch.isfinite(norm)):
            self.adam.step()
        self.drop_gradients()
        self.write_back()
        return float(norm)

    def drop_gradients(self) -> None:
        """Forgets what was gathered."""
        self.adam.zero_grad()

    @torch.no_grad()
    def write_back(self) -> None:
        """The parameters take the values of the masters."""
        for name, parameter in self.live.items():
            if self.master[name] is not parameter:
                parameter.copy_(self.master[name])

    def save(self, path: Path) -> None:
        """Master weights and both moments as one safetensors file. Raises OSError."""
        save_whole(path, self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """All that `step` changes, by name, where it is: weight.NAME, and once there was a step, step.NAME [1],
        exp_avg.NAME, exp_avg_sq.NAME."""
        found: dict[str, Tensor] = {}
        for name, weight in self.master.items():
            found[f"weight.{name}"] = weight.detach()
            for key, value in self.adam.state.get(weight, {}).items():
                found[f"{key}.{name}"] = value.reshape(-1) if value.ndim == 0 else value
        return found

    def make_moments(self, name: str) -> None:
        """Gives a parameter the state that its first step would; `tensors` then has room for a saved one."""
        weight = self.master[name]
        step = torch.zeros((), dtype=torch.float32, device=weight.device)
        moments = {key: torch.zeros_like(weight.detach()) for key in ("exp_avg", "exp_avg_sq")}
        self.adam.state[weight] = {"step": step, **moments}

    def load(self, path: Path) -> None:
        """Restores what `save` wrote. Raises ValueError where the file belongs to another model."""
        tensors = load_file(str(path))
        for name, weight in self.master.items():
            saved = tensors.get(f"weight.{name}")
            if saved is None or saved.shape != weight.shape:
                raise ValueError(f"{path}: no weight {name} of shape {tuple(weight.shape)}; the config has changed")
            with torch.no_grad():
                weight.copy_(saved)
                self.live[name].copy_(saved)
            found = {k: tensors.get(f"{k}.{name}") for k in ("step", "exp_avg", "exp_avg_sq")}
            state = {k: value.to(weight.device) for k, value in found.items() if value is not None}
            if state:
                state["step"] = state["step"].reshape(())
                self.adam.state[weight] = state


def _hand_over(master: Tensor, parameter: Tensor) -> None:
    """A parameter's gradient of one backward pass becomes part of its master's."""
    assert parameter.grad is not None
    if master.grad is None:
        master.grad = parameter.grad.float()
    else:
        master.grad.add_(parameter.grad)
    parameter.grad = None
