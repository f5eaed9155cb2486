"""The engine of the rollouts by `rollout.backend`, and how it gets new weights."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

from vtengine.cli.session import API_KEY
from vtengine.engine.base import Backend
from vtengine.engine.embedded import EmbeddedEngine, EngineConfig
from vtengine.engine.embedded.config import BATCH_TOKENS, VISION_CACHE_BYTES
from vtengine.model import VLModel
from vtengine.rollout.tokenizer import Tokenizer
from vtengine_training.sync.base import Publisher, Weights, WeightsInParts, weights_of
from vtengine_training.sync.colocated import SharedParameters
from vtengine_training.trainer.config import GrpoConfig
from vtengine_training.trainer.cost import ModelCost
from vtengine_training.trainer.memory import gpu_bytes
from vtengine_training.trainer.memory_plan import MemoryPlan, too_few_keys
from vtengine_training.trainer.ranks import Ranks

log = logging.getLogger(__name__)
NCCL_OF_SGLANG = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0"}
"""What SGLang sets in its own processes, unless they were started with something else."""


COLOCATED_SHARE = 0.5
"""Of the memory that is free when SGLang starts beside a learner: for its weights, keys and values. By itself SGLang
takes nearly all of it, and gradients and moments find none."""


def set_up_nccl(config: GrpoConfig) -> None:
    """To be called before NCCL is first used. Processes that differ in these cannot be in one group: it fails or hangs,
    and `sync = "distributed"` puts trainer and servers into one. What the environment says already stays."""
    if config.rollout.sync == "distributed":
        for name, value in NCCL_OF_SGLANG.items():
            os.environ.setdefault(name, value)


def build_engine(config: GrpoConfig, folder: Path, model: VLModel, tokenizer: Tokenizer, ranks: Ranks) -> Backend:
    """The embedded one shares the model's parameters; servers are the same for all ranks. Raises ValueError."""
    rollout = config.rollout
    if rollout.backend == "embedded":
        kv_bytes = _kv_bytes(config, model)
        if ranks.is_first and (words := too_few_keys(config, model.config, kv_bytes)):
            log.warning(words)
        engine_config = EngineConfig(
            kv_bytes=kv_bytes,
            max_running=rollout.concurrency,
            max_batch_tokens=max(BATCH_TOKENS, rollout.concurrency),  # what a GPU has room for is the learner's
            vision_cache_bytes=VISION_CACHE_BYTES,
            num_threads=config.threads,
        )
        return EmbeddedEngine(model, tokenizer, engine_config)
    from vtengine.engine.sglang import SglangEngineBackend, connect_servers, resolve

    if rollout.backend == "sglang":
        arguments: dict[str, Any] = {}
        if model.device.type == "cuda":
            arguments = {"mem_fraction_static": COLOCATED_SHARE, "enable_memory_saver": rollout.release_memory}
        given = {name.replace("-", "_") for name in rollout.engine_args}
        arguments = {name: value for name, value in arguments.items() if name not in given} | rollout.engine_args
        return SglangEngineBackend(
            folder, device=str(model.device), dtype=config.dtype, updatable=True, arguments=arguments
        )
    key = os.environ.get(API_KEY)
    found = ranks.from_first(lambda: resolve(rollout.backend, key))
    return connect_servers(",".join(found), folder, api_key=key)


def _kv_bytes(config: GrpoConfig, model: VLModel) -> int:
    gpu = gpu_bytes(model.device) if model.device.type == "cuda" else None
    return MemoryPlan.of(config, ModelCost.of(model.config), gpu).keys


def episodes_at_a_time(config: GrpoConfig, ranks: Ranks) -> int:
    """Of one rank: all of them where it has an engine of its own, its share on servers."""
    rollout = config.rollout
    return rollout.concurrency if rollout.backend == "embedded" else -(-rollout.concurrency // ranks.size)


def build_publisher(config: GrpoConfig, engine: Backend, model: VLModel, weights: Weights | None = None) -> Publisher:
    """For one process, or an engine of its own. A frozen vision tower is not sent. weights: what to send, where it is
    not what `model` trains."""
    if isinstance(engine, EmbeddedEngine):
        return SharedParameters(engine)
    weights = weights or weights_of(model, trained_only=not config.trains_vision)
    return _to_sglang(config, engine, weights, model.device)


def build_shared_publisher(
    config: GrpoConfig, engine: Backend, parts: WeightsInParts, device: torch.device, ranks: Ranks
) -> Publisher:
    """For several ranks over the same servers."""
    from vtengine.engine.sglang import SglangBackend, SglangFleet
    from vtengine_training.sync.first_rank import ByFirstRank, LedWeights

    assert isinstance(engine, SglangBackend | SglangFleet)
    weights = LedWeights(parts, ranks)
    sender = _to_sglang(config, engine, weights, device) if ranks.is_first else None
    return ByFirstRank(ranks, engine, weights, sender)


def _to_sglang(config: GrpoConfig, engine: Backend, weights: Weights, device: torch.device) -> Publisher:
    from vtengine.engine.sglang import SglangBackend, SglangFleet
    from vtengine_training.sync.sglang import ByBroadcast, ByDisk, ByTensor, Sender, SglangPublisher

    assert isinstance(engine, SglangBackend | SglangFleet)
    rollout, whole = config.rollout, config.trains_vision and not config.lora.rank
    way = rollout.sync if rollout.sync != "auto" else "tensor" if rollout.backend == "sglang" else "disk"
    senders: dict[str, Sender] = {
        "tensor": ByTensor(),
        "disk": ByDisk(Path(rollout.sync_folder) if rollout.sync_folder else None),
        "distributed": ByBroadcast("nccl" if device.type == "cuda" else "gloo", rollout.sync_address),
    }
    released = () if not rollout.release_memory else ("kv_cache", "weights") if whole else ("kv_cache",)
    return SglangPublisher(engine, weights, senders[way], released=released)


def pixels_dtype(config: GrpoConfig) -> torch.dtype:
    """Of the pixel values: over HTTP they travel as bytes, which can be had back from float32 only."""
    over_http = config.rollout.backend.startswith("http")
    return torch.bfloat16 if config.dtype == "bfloat16" and not over_http else torch.float32
