"""A GRPO run: a TOML file, read into frozen dataclasses; an unknown key is an error. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from vtengine_training.checks import at_least, not_empty, positive_or_none
from vtengine_training.data.config import DataConfig, SourceConfig
from vtengine_training.grpo.config import LossConfig
from vtengine_training.loggers.config import DEFAULT_LOGGERS, LoggerName, WandbConfig
from vtengine_training.lora.config import LoraConfig
from vtengine_training.rewards.rewarder import RewardConfig
from vtengine_training.sft.config import OptimizerConfig


@dataclass(frozen=True)
class ValidationConfig(SourceConfig):
    """Greedy episodes before the first step, every so many (0 = never) and after the last: `val/*` in the metrics.

    Examples as for training; `glance` draws from the validation split.
    """

    every: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "every")
        if self.every:
            self.require_source("validation")


@dataclass(frozen=True)
class RolloutConfig:
    """One step's rollouts: `prompts` groups of `n` siblings.

    resolution: adaptive, or the one view that is always shown: low or high, in one turn.
    concurrency: episodes in the engine at a time. max_refill: prompts drawn for one step, as a multiple of `prompts`,
    before the step goes on with fewer. oversample: groups drawn at once, as a multiple of those still missing, and more
    by what the step has had to drop so far; what is left over is kept for the next step, for at most max_stale steps.
    kv_mib: of the embedded engine's keys and values. None: on a GPU what learning leaves of it (`--dry-run` says how
    much), in main memory 1024.
    top_p, top_k: must be off: the engine's log-probabilities would be of the truncated distribution.
    backend: embedded (the engine reads the learner's own weights), sglang (in this process), or http://host:port of an
    SGLang server; several with commas between. sync: how SGLang gets new weights: tensor (same machine; on a GPU the
    same one), distributed (NCCL, on a CPU gloo), disk; auto: tensor for sglang, disk for addresses. sync_folder: for
    disk, one that the servers see. sync_address: of this machine for `distributed`, as the servers reach it.
    Over addresses several ranks share the servers: `concurrency` is that of all ranks together, and the first rank
    sends the weights (sync_folder, sync_address: of its machine).
    release_memory: SGLang gives its memory back while the learner works (it needs --enable-memory-saver).
    engine_args: of SGLang's engine by name, with backend = "sglang". On a GPU mem_fraction_static is 0.5 unless given:
    of the memory that is free when the engine starts; the rest is for gradients, moments and activations.
    dump_every: every so many steps the episodes are written to rollouts/, for `vtengine view`; 0 = never.
    ahead: while a step learns, the rollouts of the next are sampled, with the weights that this one began with: one
    step off policy, in the time of the longer of the two. Engines need weights of their own: SGLang's have; on a CPU
    the embedded one gets a copy, and as many threads as the learner.
    """

    prompts: int = 32
    n: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 512
    max_turns: int = 2
    resolution: Literal["adaptive", "low", "high"] = "adaptive"
    max_context_tokens: int | None = None
    concurrency: int = 64
    max_refill: float = 4.0
    oversample: float = 1.0
    max_stale: int = 1
    kv_mib: int | None = None
    image_cache_mib: int = 512
    backend: str = "embedded"
    sync: Literal["auto", "tensor", "distributed", "disk"] = "auto"
    sync_folder: str = ""
    sync_address: str = "127.0.0.1"
    release_memory: bool = False
    engine_args: dict[str, Any] = field(default_factory=dict)
    dump_every: int = 0
    ahead: bool = False

    def __post_init__(self) -> None:
        if self.top_p != 1 or self.top_k != 0:
            raise ValueError(
                f"top_p = {self.top_p}, top_k = {self.top_k}: training samples from the whole distribution, because "
                "the log-probabilities of a truncated one are renormalised; use top_p = 1.0 and top_k = 0"
            )
        if self.n < 2:
            raise ValueError(f"n = {self.n}: an advantage needs siblings to compare with; use 2 or more")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature = {self.temperature}: must be positive; greedy siblings would be equal")
        servers = self.backend.startswith(("http://", "https://"))
        if self.backend not in ("embedded", "sglang") and not servers:
            raise ValueError(f"backend = {self.backend!r}: must be embedded, sglang or http://host:port[,http://...]")
        if self.backend == "embedded" and (self.sync != "auto" or self.release_memory):
            raise ValueError("sync, release_memory: the embedded engine shares the learner's weights; leave them out")
        if self.engine_args and self.backend != "sglang":
            raise ValueError(f'engine_args: is for backend = "sglang", the backend is {self.backend!r}; leave it out')
        if self.ahead and self.release_memory:
            raise ValueError(
                "ahead, release_memory: with ahead SGLang generates while the learner works; leave one out"
            )
        at_least(self, 1, "prompts", "max_new_tokens", "max_turns", "concurrency", "max_refill", "oversample")
        for name in ("max_refill", "oversample"):
            if math.isinf(getattr(self, name)):
                raise ValueError(f"{name} = inf: must be finite; it bounds the draws of a step")
        positive_or_none(self, "kv_mib", "max_context_tokens")
        at_least(self, 0, "max_stale", "image_cache_mib", "dump_every")


@dataclass(frozen=True)
class UpdateConfig:
    """minibatch_prompts: groups per optimiser step; None = all of a training step. epochs: passes over the rollouts.

    max_tokens: of a packed micro-batch; a longer sequence goes alone. logits_chunk: trainable positions whose logits
    exist at the same time. logits: fused = gradients are formed with the loss, chunk by chunk (`grpo_loss`); plain = by
    torch, for comparison. share_images: the vision tower runs once per distinct image of a micro-batch. share_prefix:
    the prompt that siblings have in common is computed once per micro-batch.
    constant_length: divisor of the `constant` aggregation; None = rollout.max_new_tokens.
    max_skipped: updates in a row without finite gradients, or steps in a row without any group, before the run stops.
    train_vision: with [lora], the adapters' own `vision` and `merger` say it.
    recompute: layers keep only their inputs and run again in the backward pass: less memory, a third more work.
    shard_ranks: of several ranks, so many neighbours (the GPUs of a node) hold the weights together, and the next ones
    hold them again: layers are gathered within a node, gradients summed over all. None: one copy in pieces on all.
    warmup: steps in which the rate rises to learning_rate; schedule: how it then goes to final_rate, by the last step.
    """

    learning_rate: float = 1e-6
    warmup: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_rate: float = 0.0
    minibatch_prompts: int | None = None
    epochs: int = 1
    max_tokens: int = 4096
    logits_chunk: int = 1024
    logits: Literal["fused", "plain"] = "fused"
    share_images: bool = True
    share_prefix: bool = True
    train_vision: bool = True
    recompute: bool = False
    shard_ranks: int | None = None
    constant_length: int | None = None
    max_skipped: int = 5
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(weight_decay=0.0, beta2=0.999))

    def __post_init__(self) -> None:
        if not (self.learning_rate >= 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate = {self.learning_rate}: must be 0 or more")
        if not 0 <= self.final_rate <= self.learning_rate:
            raise ValueError(
                f"final_rate = {self.final_rate}: must be from 0 to learning_rate (= {self.learning_rate:g})"
            )
        if self.final_rate and self.schedule == "constant":
            raise ValueError(f'final_rate = {self.final_rate}: needs schedule = "linear" or "cosine"')
        at_least(self, 1, "epochs", "max_tokens", "logits_chunk", "max_skipped")
        at_least(self, 0, "warmup")
        if self.shard_ranks is not None and self.shard_ranks < 2:
            raise ValueError(f"shard_ranks = {self.shard_ranks}: must be 2 or more; leave it out to use all ranks")
        for name in ("minibatch_prompts", "constant_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be 1 or more")


@dataclass(frozen=True)
class CheckpointConfig:
    """every: steps between checkpoints; the last step is always saved. keep: how many stay on the disk."""

    every: int = 10
    keep: int = 2

    def __post_init__(self) -> None:
        at_least(self, 1, "every", "keep")


@dataclass(frozen=True)
class GrpoConfig:
    """The whole file. model: a checkpoint folder, a Hugging Face id, or `glance`; also the reference of the KL term.

    profile: a name, a path, or empty for the one that belongs to the model. resume: auto goes on from the output's
    newest checkpoint; never refuses an output that has one. peak_tflops: of the machine, to report `mfu`.
    rank_timeout_s: longest time that one of several ranks waits for the others: the slowest rollouts of a step.
    loggers: where metrics go: console, jsonl (always), tensorboard, wandb.
    """

    model: str
    output: str
    data: DataConfig
    steps: int = 100
    seed: int = 0
    profile: str = ""
    device: Literal["cpu", "cuda", "auto"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int | None = None
    resume: Literal["auto", "never"] = "auto"
    max_pixels: int | None = None
    peak_tflops: float | None = None
    rank_timeout_s: float = 7200.0
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    loggers: tuple[LoggerName, ...] = DEFAULT_LOGGERS
    lora: LoraConfig = field(default_factory=LoraConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        not_empty(self, "model", "output")
        at_least(self, 1, "steps")
        positive_or_none(self, "threads", "max_pixels", "peak_tflops", "rank_timeout_s")
        if self.update.warmup > self.steps:
            raise ValueError(f"update.warmup = {self.update.warmup}: must be at most steps (= {self.steps}); lower it")
        if (self.update.minibatch_prompts or 1) > self.rollout.prompts:
            raise ValueError(
                f"update.minibatch_prompts = {self.update.minibatch_prompts}: must be at most rollout.prompts "
                f"(= {self.rollout.prompts})"
            )

    @property
    def trains_vision(self) -> bool:
        """Whether gradients reach the vision tower."""
        return self.lora.trains_vision if self.lora.rank else self.update.train_vision

    @property
    def updates_per_step(self) -> int:
        """Optimiser steps per training step with all its groups."""
        return math.ceil(self.rollout.prompts / (self.update.minibatch_prompts or self.rollout.prompts)) * (
            self.update.epochs
        )
