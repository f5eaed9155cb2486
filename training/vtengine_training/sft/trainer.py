"""The training loop: batches by number, two losses, metrics as JSON lines, checkpoints that resume exactly."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from vtengine.config import to_dict
from vtengine.model import Qwen2_5_VL, VLModel, load_model, meta_model, plain_attention, save_model
from vtengine.protocol.profile import PROFILE_FILE, Profile, load_profile, profile_file
from vtengine_training.eval.runner import model_folder
from vtengine_training.files import write_whole
from vtengine_training.fingerprint import weights_fingerprint
from vtengine_training.glance.views import LIMITS
from vtengine_training.lora.adapters import Adapters, save_adapter
from vtengine_training.seeding import seed_generators
from vtengine_training.sft.batch import Batch, make_batch
from vtengine_training.sft.config import PhaseConfig, SftConfig
from vtengine_training.sft.episodes import Renderer
from vtengine_training.sft.evaluate import Asked, forced_accuracy, questions
from vtengine_training.sft.loss import DenseHead, losses
from vtengine_training.sft.optim import MasterAdamW, learning_rate
from vtengine_training.sft.tokenizer import token_ids, train_tokenizer, write_processor_files

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Teaching:
    """What makes batches out of step numbers; cheap to rebuild in a worker process."""

    config: SftConfig
    renderer: Renderer
    image_token: int

    @staticmethod
    def build(config: SftConfig) -> Teaching:
        profile = load_profile(config.profile)
        tokenizer = make_tokenizer(config, profile)
        return Teaching(config, Renderer(tokenizer, profile), token_ids(tokenizer)["<|image_pad|>"])

    def batch(self, step: int) -> Batch:
        phase, _ = phase_at(self.config, step)
        return make_batch(self.renderer, self.image_token, self.config.data, phase, step)


def make_tokenizer(config: SftConfig, profile: Profile) -> Tokenizer:
    """That of the checkpoint the run begins with, or a new one made for the profile."""
    if config.init:
        return Tokenizer.from_file(str(model_folder(config.init, "init") / "tokenizer.json"))
    return train_tokenizer(profile)


def make_model(config: SftConfig, tokenizer: Tokenizer) -> VLModel:
    """The checkpoint the run begins with, or random weights. Raises ValueError if the checkpoint has another shape."""
    wanted = config.shape.model(tokenizer.get_vocab_size(), token_ids(tokenizer))
    if not config.init:
        return Qwen2_5_VL.build(wanted, config.seed)
    model = load_model(model_folder(config.init, "init"), torch.device("cpu"), torch.float32)
    if (model.config.vision, model.config.text) != (wanted.vision, wanted.text):
        raise ValueError(f"init = {config.init!r}: its config.json differs from [shape]; make [shape] the same")
    return model


def phase_at(config: SftConfig, step: int) -> tuple[PhaseConfig, int]:
    """The phase that step `step` (from 0) belongs to, and the step's number inside it."""
    for phase in config.phases:
        if step < phase.steps:
            return phase, step
        step -= phase.steps
    raise ValueError(f"step: {step} past the last phase's end")


_teaching: Teaching | None = None


def _start_worker(config: SftConfig) -> None:
    global _teaching
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the run, which ends its workers when it has saved
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.nice(5)
    _teaching = Teaching.build(config)


def _work(step: int) -> Batch:
    assert _teaching is not None
    return _teaching.batch(step)


def batches(teaching: Teaching, first: int, last: int) -> Generator[Batch, None, None]:
    """Batches of steps first to last - 1 in order, made ahead in worker processes when there are any."""
    config = teaching.config
    if config.data.workers == 0:
        for step in range(first, last):
            yield teaching.batch(step)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(config.data.workers, context, _start_worker, (config,)) as pool:
        ahead: list[Future[Batch]] = []
        following = first
        try:
            for _ in range(first, last):
                while following < last and len(ahead) < config.data.prefetch:
                    ahead.append(pool.submit(_work, following))
                    following += 1
                yield ahead.pop(0).result()
        finally:
            pool.shutdown(cancel_futures=True)


class Run:
    """One training run in its output folder: model, dense head, optimizer, step count.

    stop_requested: finish the step, save, return (a signal handler sets it).
    """

    def __init__(self, config: SftConfig) -> None:
        self.config = config
        self.folder = Path(config.output)
        self.profile = load_profile(config.profile)
        self.tokenizer = make_tokenizer(config, self.profile)
        self.model = make_model(config, self.tokenizer)
        model_config = self.model.config
        self.head = DenseHead(model_config.text.hidden_size, config.seed)
        self.adapters: Adapters | None = None
        if config.lora.rank:
            self.adapters = Adapters.put_into(self.model, config.lora)
            self.adapters.begin(config.seed)
        named = [(f"model.{n}", p) for n, p in self.model.named_parameters() if p.requires_grad]
        named += [(f"head.{n}", p) for n, p in self.head.named_parameters()]
        self.optimizer = MasterAdamW(named, config.optimizer)
        if config.bfloat16:
            self.model.to(torch.bfloat16)
            self.head.to(torch.bfloat16)
        self.teaching = Teaching(config, Renderer(self.tokenizer, self.profile), model_config.image_token_id)
        self.step = 0
        self.stop_requested = False

    @property
    def _resume_file(self) -> Path:
        return self.folder / "resume.json"

    def resume(self) -> bool:
        """Continues from the folder's last checkpoint, if it has one. Raises ValueError if the config differs."""
        if not self._resume_file.exists():
            return False
        state = json.loads(self._resume_file.read_text())
        for part, wanted in self._identity().items():
            if state.get(part, wanted) != wanted:
                raise ValueError(f"{self._resume_file}: made with another [{part}]; use another output, or delete it")
        self.optimizer.load(self.folder / state["file"])
        self.step = int(state["step"])
        return True

    def save(self) -> None:
        """Checkpoint for resuming, and the model in Hugging Face format under `model/`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = f"resume-{self.step}.safetensors"
        self.optimizer.save(self.folder / file)
        write_whole(self._resume_file, json.dumps({"step": self.step, "file": file} | self._identity()))
        for old in self.folder.glob("resume-*.safetensors"):
            if old.name != file:
                old.unlink()
        self.export(self.folder / "model")
        if self.adapters is not None:
            base = model_folder(self.config.init, "init")
            save_adapter(self.adapters.tensors(), self.adapters, base, self.folder / "adapter")

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that goes on from it. Adapters are worth nothing without
        the model that they sit on."""
        found: dict[str, Any] = {"shape": to_dict(self.config.shape)}
        if self.adapters is not None:
            found |= {
                "lora": to_dict(self.config.lora),
                "init": weights_fingerprint(model_folder(self.config.init, "init")),
            }
        return found

    def export(self, folder: Path) -> None:
        """The model alone, bfloat16, adapters merged, with all its files: loads in transformers, SGLang and vLLM."""
        if self.adapters is not None:
            shipped = self.adapters.merged_model().to(torch.bfloat16)
        else:
            shipped = meta_model(self.model.config).to(torch.bfloat16).to_empty(device="cpu")
            weights = {n.removeprefix("model."): w for n, w in self.optimizer.master.items() if n.startswith("model.")}
            shipped.load_state_dict({name: weight.to(torch.bfloat16) for name, weight in weights.items()})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PROFILE_FILE).write_bytes(profile_file(self.config.profile).read_bytes())
        write_processor_files(self.tokenizer, folder, LIMITS.min_pixels, LIMITS.max_pixels)
        save_model(shipped, folder)

    def train(self, report: Report, until: int | None = None) -> None:
        """Runs to step `until` (default: the end), or until stop_requested, reporting metrics; saves on the way and at
        the end."""
        torch.set_num_threads(self.config.threads)
        last = min(until or self.config.total_steps, self.config.total_steps)
        asked = questions("validation", self.config.data.seed, self.config.eval_questions)
        began = time.perf_counter()
        with closing(batches(self.teaching, self.step, last)) as made:
            for batch in made:
                figures = self._update(batch)
                self.step += 1
                is_last, stops = self.step == last, self.stop_requested
                if self.step % self.config.log_every == 0 or is_last:
                    figures["seconds"] = round(time.perf_counter() - began, 2)
                    report(figures)
                phase, _ = phase_at(self.config, self.step - 1)
                if phase.questions and (self.step % self.config.eval_every == 0 or is_last):
                    report({"step": self.step, "phase": phase.name, "validation": self._validate(asked)})
                if self.step % self.config.save_every == 0 or is_last or stops:
                    self.save()  # after the rows: a kill in between must not lose those of a saved step
                if stops:
                    return

    def _validate(self, asked: list[Asked]) -> dict[str, float]:
        with plain_attention():
            return forced_accuracy(self.model, self.teaching.renderer, asked, self.teaching.image_token)

    def _update(self, batch: Batch) -> dict[str, Any]:
        phase, inside = phase_at(self.config, self.step)
        rate = learning_rate(phase, inside)
        seed_generators(self.config.seed, "step", self.step)
        with plain_attention():  # on CPUs faster than the flash kernel, whose backward is slow there
            result = losses(self.model, self.head, batch, phase.aux_weight, phase.look_weight)
            result.total.backward()  # type: ignore[no-untyped-call]
        norm = self.optimizer.step(rate)
        figures = {key: round(value, 5) for key, value in result.figures.items()}
        return {"step": self.step + 1, "phase": phase.name, "rate": rate, "norm": round(norm, 4), **figures}
