"""The cold start's configuration: a TOML file, read into frozen dataclasses; an unknown key is an error."""

from __future__ import annotations

from dataclasses import dataclass, field

from vtengine.model.config import ModelConfig
from vtengine.model.qwen2_5_config import TextConfig, VisionConfig
from vtengine_training.checks import at_least, not_empty
from vtengine_training.glance.scene import KINDS
from vtengine_training.loggers.config import DEFAULT_LOGGERS, LoggerName, WandbConfig
from vtengine_training.lora.config import LoraConfig


def _share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} = {value}: must be between 0 and 1")


@dataclass(frozen=True)
class ShapeConfig:
    """Sizes of the model. Text heads have 64 channels, vision heads 32."""

    text_hidden: int = 256
    text_layers: int = 4
    text_heads: int = 4
    text_kv_heads: int = 2
    text_inner: int = 640
    vision_hidden: int = 192
    vision_layers: int = 4
    vision_heads: int = 6
    vision_inner: int = 512
    full_attention: tuple[int, ...] = (1, 3)

    def model(self, vocabulary: int, ids: dict[str, int]) -> ModelConfig:
        """The model's config for a tokenizer of `vocabulary` tokens, `ids` by special token."""
        vision = VisionConfig(
            depth=self.vision_layers,
            hidden_size=self.vision_hidden,
            intermediate_size=self.vision_inner,
            num_heads=self.vision_heads,
            out_hidden_size=self.text_hidden,
            fullatt_block_indexes=self.full_attention,
        )
        half = self.text_hidden // self.text_heads // 2
        text = TextConfig(
            vocab_size=-(-vocabulary // 64) * 64,
            hidden_size=self.text_hidden,
            intermediate_size=self.text_inner,
            num_layers=self.text_layers,
            num_heads=self.text_heads,
            num_kv_heads=self.text_kv_heads,
            rope_theta=10_000.0,
            mrope_section=(half // 4, (half - half // 4) // 2, half - half // 4 - (half - half // 4) // 2),
            max_position_embeddings=2048,
        )
        return ModelConfig(
            vision,
            text,
            tie_word_embeddings=True,
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            bos_token_id=ids["<|endoftext|>"],
            eos_token_id=ids["<|im_end|>"],
        )


@dataclass(frozen=True)
class DataConfig:
    """seed: of the training scenes. call_share: how often an adaptive episode asks for the high view, needed or not."""

    seed: int = 1
    call_share: float = 0.5
    guess_weight: float = 0.3
    workers: int = 1
    prefetch: int = 6

    def __post_init__(self) -> None:
        _share("call_share", self.call_share)
        _share("guess_weight", self.guess_weight)
        at_least(self, 0, "seed", "workers")
        at_least(self, 1, "prefetch")


@dataclass(frozen=True)
class PhaseConfig:
    """One stretch of training. questions = 0 trains the vision tower alone, on the dense labels. pages: pictures full
    of random characters that join each batch, for the dense labels only.

    low_share, high_share: direct prompts; the rest is adaptive. (Vision only: low_share = scenes also shown low.)
    aux_weight: of the dense loss; look_weight: of the loss on where the answer's tokens look.
    guess_share: of the questions asked where they cannot be answered, those that keep a random answer.
    kinds: how often a kind of scene is drawn against the others; 1 where none is given.
    """

    name: str = "language"
    steps: int = 1000
    scenes: int = 32
    questions: int = 2
    pages: int = 0
    learning_rate: float = 1e-3
    final_rate: float = 1e-4
    warmup: int = 50
    aux_weight: float = 0.3
    look_weight: float = 0.0
    low_share: float = 0.15
    high_share: float = 0.35
    guess_share: float = 1.0
    kinds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "scenes", "warmup")
        at_least(self, 0, "questions", "pages")
        if self.warmup > self.steps:
            raise ValueError(f"warmup = {self.warmup}: must be at most steps (= {self.steps}); lower it")
        for kind, weight in self.kinds.items():
            if kind not in KINDS:
                raise ValueError(f"kinds.{kind}: unknown; known: {', '.join(KINDS)}")
            if not 0 <= weight < float("inf"):
                raise ValueError(f"kinds.{kind} = {weight}: must be 0 or more, and finite")
        if not any(self.kinds.get(kind, 1.0) for kind in KINDS):
            raise ValueError("kinds: every weight is 0; leave one kind above it")
        for name in ("low_share", "high_share", "guess_share"):
            _share(name, getattr(self, name))
        if self.questions and self.low_share + self.high_share > 1:
            raise ValueError(f"low_share + high_share = {self.low_share + self.high_share}: must be at most 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. clip: the largest norm of all gradients together; inf = they are never clipped."""

    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay = {self.weight_decay}: must be 0 or more, and finite")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 0 and below 1")
        if not self.clip > 0:
            raise ValueError(f"clip = {self.clip}: must be more than 0; inf never clips")


@dataclass(frozen=True)
class SftConfig:
    """The whole file. init: the checkpoint to begin with, a folder or a shipped name; empty = random weights.

    loggers: where metrics go: console, jsonl (always), tensorboard, wandb.
    """

    output: str = "runs/glance-sft"
    init: str = ""
    profile: str = "glance"
    seed: int = 0
    threads: int = 1
    bfloat16: bool = True
    log_every: int = 20
    eval_every: int = 500
    eval_questions: int = 200
    save_every: int = 200
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    phases: tuple[PhaseConfig, ...] = (PhaseConfig(),)
    loggers: tuple[LoggerName, ...] = DEFAULT_LOGGERS
    lora: LoraConfig = field(default_factory=LoraConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError("phases = []: name at least one [[phases]] table")
        if self.lora.rank and not self.init:
            raise ValueError(f"lora.rank = {self.lora.rank}: adapters need a model to sit on; name it with init")
        not_empty(self, "output")
        at_least(self, 1, "threads", "log_every", "eval_every", "eval_questions", "save_every")

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)
