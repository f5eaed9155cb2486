"""From a configuration to everything that a run needs: model, engine, data, rewards, learner. The only wiring."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vtengine.engine.base import Backend, SamplingParams
from vtengine.model import VLModel
from vtengine.protocol.conversation import Limits
from vtengine.protocol.profile import Profile, load_profile, own_profile, profile_file
from vtengine.rollout.group import Setting
from vtengine.rollout.tokenizer import Tokenizer
from vtengine.vision.pipeline import ImagePipeline
from vtengine.vision.processor import image_processor
from vtengine_training.data.examples import Dataset
from vtengine_training.data.load import load_examples
from vtengine_training.data.sampler import Sampler
from vtengine_training.eval.runner import model_folder
from vtengine_training.lora.adapters import Adapters
from vtengine_training.rewards.rewarder import RewardConfig, Rewarder
from vtengine_training.sync.base import Publisher
from vtengine_training.trainer.collect import Collector
from vtengine_training.trainer.config import GrpoConfig
from vtengine_training.trainer.cost import MIB
from vtengine_training.trainer.models import Models, build_models
from vtengine_training.trainer.ranks import Ranks
from vtengine_training.trainer.rollout_engine import build_engine, episodes_at_a_time, pixels_dtype
from vtengine_training.trainer.step import Learner


@dataclass(frozen=True, eq=False)
class Parts:
    """A run's machinery. An embedded engine reads `model`: the learner's own parameters, or a copy. profile: the file
    that the configuration names, to be exported with the model; empty where the model's own counts."""

    folder: Path
    models: Models
    engine: Backend
    pipeline: ImagePipeline
    dataset: Dataset
    validation: Dataset | None
    rewarder: Rewarder
    collector: Collector
    learner: Learner
    publisher: Publisher
    profile: bytes

    @property
    def model(self) -> VLModel:
        return self.models.model

    @property
    def adapters(self) -> Adapters | None:
        return self.models.adapters


def build_parts(config: GrpoConfig, rewarder: Rewarder | None = None, ranks: Ranks | None = None) -> Parts:
    """Loads and starts everything; close engine and pipeline afterwards. Raises ValueError with field and remedy."""
    ranks = ranks or Ranks()
    folder = ranks.one_before_others(lambda: model_folder(config.model))  # who comes later finds it in the cache
    device = pick_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    rewarder = rewarder or Rewarder(share_judge(config.reward, ranks))
    dataset, validation = ranks.one_before_others(lambda: _datasets(config))
    tokenizer = Tokenizer.load(folder)
    own_profile_file = profile_file(config.profile).read_bytes() if config.profile else b""
    profile = load_profile(config.profile) if config.profile else own_profile(folder, "vtengine")
    pipeline = build_pipeline(config, folder, profile)
    models = build_models(config, folder, device, tokenizer.banned_ids, ranks)
    rollout = replace(config.rollout, concurrency=episodes_at_a_time(config, ranks))
    learner = Learner(
        models.policy, models.reference, models.optimizer, config.loss, config.update, rollout.max_new_tokens, ranks
    )
    engine = build_engine(config, folder, models.model, tokenizer, ranks)
    limits = Limits(rollout.resolution, rollout.max_turns, max_context_tokens=rollout.max_context_tokens)
    sampling = SamplingParams(max_new_tokens=rollout.max_new_tokens, temperature=rollout.temperature, seed=config.seed)
    setting = Setting(engine, pipeline, tokenizer, profile, limits, sampling)
    sampler = Sampler(len(dataset), config.data.seed)
    meeting = ranks.branch() if rollout.ahead else ranks  # the learner meets at the same time
    collector = Collector(setting, dataset, sampler, rewarder, rollout, config.loss, config.seed, meeting)
    publisher = models.publisher(config, engine, ranks)
    return Parts(
        folder, models, engine, pipeline, dataset, validation, rewarder, collector, learner, publisher, own_profile_file
    )


def share_judge(config: RewardConfig, ranks: Ranks) -> RewardConfig:
    """The judge's limits hold for the whole run: each rank gets its share of them."""
    judge = config.judge
    concurrency = max(1, judge.concurrency // ranks.size)
    per_minute = judge.requests_per_minute and max(1, judge.requests_per_minute // ranks.size)
    return replace(config, judge=replace(judge, concurrency=concurrency, requests_per_minute=per_minute))


def _datasets(config: GrpoConfig) -> tuple[Dataset, Dataset | None]:
    place = data_folder(config)
    validation = load_examples(config.validation, place, "validation") if config.validation.every else None
    return load_examples(config.data, place, "train", config.data.seed), validation


def build_pipeline(config: GrpoConfig, folder: Path, profile: Profile) -> ImagePipeline:
    """As the checkpoint and the profile want their images. Raises ValueError for pixels that we would not make."""
    processor = image_processor(folder)
    bounds = processor.limits
    if config.max_pixels is not None:
        bounds = replace(bounds, max_pixels=config.max_pixels)
    return ImagePipeline(
        bounds,
        "compact",
        pixels_dtype(config),
        cache_bytes=config.rollout.image_cache_mib * MIB,
        mean=processor.mean,
        std=processor.std,
        resize_mode=profile.resize_mode,
        low_view=profile.low_view,
    )


def pick_device(name: str) -> torch.device:
    """auto: the first GPU, where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError('device = "cuda": torch sees no GPU here; use "cpu" or "auto"')
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def data_folder(config: GrpoConfig) -> Path:
    """Where generated questions and unpacked images go."""
    return Path(config.data.folder or Path(config.output) / "data")
